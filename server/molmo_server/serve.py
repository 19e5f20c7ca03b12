"""`molmo serve`: gateway and engine with one command.

The web server answers `/health` at once; the engine starts behind it. Progress goes to standard
error, the address and a command to try go to standard output when the engine is ready.

Knows: how gateway and engine are put together, exit codes. Does not know: routes, processes, what
the person at the terminal is told (`terminal`).

Exit codes: 0 ended in order, 1 the engine could not be started, 2 the settings or the checkpoint
cannot be used, 3 the port is taken.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import orjson
import uvicorn
import uvloop
from PIL import Image
from pydantic import ValidationError

from molmo_core.errors import CheckpointError
from molmo_server.app import create_app
from molmo_server.checkpoints.folder import Checkpoint, read_checkpoint
from molmo_server.engine.launch import EngineSettings, engine_command
from molmo_server.engine_pool import (
    EngineAddress,
    EnginePool,
    EngineProcess,
    EngineTiming,
    RemoteEngine,
    RestartPolicy,
    SupervisedEngine,
)
from molmo_server.errors import from_validation
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import configure_logging
from molmo_server.terminal import note, tell

EXIT_OK, EXIT_NO_ENGINE, EXIT_BAD_SETTINGS, EXIT_PORT_TAKEN = 0, 1, 2, 3


def serve_command(
    *,
    host: str | None = None,
    port: int | None = None,
    checkpoint: Path | None = None,
    store: Path | None = None,
    engine_url: str | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    n_threads: int | None = None,
    run_dir: Path | None = None,
) -> int:
    """Serve a checkpoint on this machine.

    Every option can also be set in the environment, as `MOLMO_PORT=9000`; there are more settings
    than options. Exit codes: 0 ended in order, 1 the engine could not be started, 2 settings or
    checkpoint cannot be used, 3 the port is taken.

    Parameters
    ----------
    host
        Address to listen on; 127.0.0.1 unless given. 0.0.0.0 lets other machines in.
    port
        Port to listen on; 8000 unless given, 0 lets the system choose.
    checkpoint
        Folder in the released layout; the packaged molmo2-tiny unless given.
    store
        Store of published checkpoints: the current one is served, and every later one.
    engine_url
        An engine that runs elsewhere, instead of starting one.
    dtype
        Number format of the engine: auto, bfloat16, float32.
    max_model_len
        Most tokens of prompt and answer; what the checkpoint allows unless given.
    n_threads
        On CPU: threads of the engine; all cores, for molmo2-tiny one, unless given.
    run_dir
        Folder for the engine's logs; a temporary one unless given.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        settings = MolmoSettings(**given)
    except ValidationError as error:
        return _complain(EXIT_BAD_SETTINGS, f"settings: {from_validation(error).message}")
    return run_server(settings)


def run_server(settings: MolmoSettings) -> int:
    """Serve until told to end; returns the exit code."""
    try:
        checkpoint = read_checkpoint(
            settings.checkpoint_folder, max_model_len=settings.max_model_len
        )
    except CheckpointError as error:
        return _complain(EXIT_BAD_SETTINGS, error.message)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return _complain(EXIT_BAD_SETTINGS, f"cannot listen on {settings.host}: {error}")
        return _complain(
            EXIT_PORT_TAKEN,
            f"port {settings.port} on {settings.host} is taken by another program; "
            f"end that one, or choose another: molmo serve --port {settings.port + 1}",
        )
    # Short and private: a socket's path may have 107 characters.
    private = Path(tempfile.mkdtemp(prefix="molmo-"))
    configure_logging(settings.log_level)
    try:
        return uvloop.run(_serve(settings, checkpoint, listener, private))
    finally:
        listener.close()
        shutil.rmtree(private, ignore_errors=True)


def build_engines(
    settings: MolmoSettings, checkpoint: Checkpoint, *, socket_dir: Path, log_dir: Path
) -> EnginePool:
    """One engine: at the URL of the settings, or a process of our own."""
    timing = EngineTiming(
        health_interval_s=settings.health_interval_s,
        health_timeout_s=settings.health_timeout_s,
        hang_grace_s=settings.hang_grace_s,
        start_timeout_s=settings.start_timeout_s,
    )
    warm_ups = _warm_ups(settings.served_name)
    if settings.engine_url is not None:
        address = EngineAddress(url=settings.engine_url)
        remote = RemoteEngine(name="engine-0", address=address, timing=timing, warm_ups=warm_ups)
        return EnginePool([remote])
    process = engine_process(settings, checkpoint, socket_dir=socket_dir, log_dir=log_dir)
    restarts = RestartPolicy(
        first_backoff_s=settings.first_backoff_s,
        longest_backoff_s=settings.longest_backoff_s,
        max_failed_starts=settings.max_failed_starts,
    )
    engine = SupervisedEngine(
        name="engine-0", process=process, timing=timing, restarts=restarts, warm_ups=warm_ups
    )
    engine.checkpoint_id = checkpoint.id
    return EnginePool([engine])


def engine_process(
    settings: MolmoSettings, checkpoint: Checkpoint, *, socket_dir: Path, log_dir: Path
) -> EngineProcess:
    """How the engine of our own is started on a checkpoint."""
    engine_socket = socket_dir / "engine-0.sock"
    argv, environment = engine_command(
        EngineSettings(
            checkpoint=checkpoint.folder,
            socket=engine_socket,
            served_name=settings.served_name,
            dtype=settings.dtype,
            max_model_len=checkpoint.max_model_len,
            max_num_seqs=settings.max_concurrent + 1,  # one for the question whether it hangs
            max_images=settings.max_images,
            kv_cache_gib=settings.kv_cache_gib,
            is_eager=settings.is_eager,
            n_threads=settings.engine_threads,
            # The engine's own words then name the checkpoint, also inside streams.
            extra_arguments=("--fingerprint-mode", "custom", "--fingerprint-value", checkpoint.id),
        )
    )
    return EngineProcess(
        argv=argv, environment=environment, socket=engine_socket, log=log_dir / "engine-0.log"
    )


def _warm_ups(served_name: str) -> tuple[bytes, ...]:
    """A text and a picture: what is loaded on first use is loaded before anyone waits for it."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    text = {"type": "text", "text": "Hi"}
    image = {"type": "image_url", "image_url": {"url": url}}
    return tuple(
        orjson.dumps(
            {
                "model": served_name,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 1,
            }
        )
        for content in ([text], [image, text])
    )


async def _serve(
    settings: MolmoSettings, checkpoint: Checkpoint, listener: socket.socket, private: Path
) -> int:
    log_dir = settings.run_dir or private
    log_dir.mkdir(parents=True, exist_ok=True)
    engines = build_engines(settings, checkpoint, socket_dir=private, log_dir=log_dir)
    process_of = partial(engine_process, settings, socket_dir=private, log_dir=log_dir)
    app = create_app(settings, engines, checkpoint, process_of=process_of)
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # the Edge writes one line a request
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.drain_s)),
        )
    )
    address = _address(settings.host, listener)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    telling = asyncio.create_task(tell(engines, address, checkpoint.id, log_dir))
    await asyncio.wait({serving, telling}, return_when=asyncio.FIRST_COMPLETED)
    has_engine = not telling.done() or telling.result()
    if not has_engine:
        server.should_exit = True
    await serving
    telling.cancel()
    return EXIT_OK if has_engine else EXIT_NO_ENGINE


class _Server(uvicorn.Server):
    """Ends in order at SIGINT and SIGTERM, without uvicorn's raising the signal once more."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        if not self.should_exit:
            note("molmo: ending; requests in flight may finish (again: end at once)")
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def _address(host: str, listener: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


def _complain(exit_code: int, message: str) -> int:
    note(f"molmo serve: {message}")
    return exit_code
