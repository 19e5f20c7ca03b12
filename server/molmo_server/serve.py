"""`molmo serve`: gateway and engine with one command.

The web server answers `/health` at once; the engine starts behind it. Progress goes to standard
error, the address and a command to try go to standard output when the engine is ready.

Knows: how gateway and engine are put together, exit codes. Does not know: routes, processes, what
the person at the terminal is told (`terminal`).

Exit codes: 0 ended in order, 1 the engine could not be started, 2 the settings, the checkpoint or
the file of keys cannot be used, 3 the port is taken.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import uvicorn
import uvloop
from cyclopts import Parameter
from fastapi import FastAPI
from pydantic import ValidationError

from molmo_core.errors import BatchStoreError, CheckpointError, KeyStoreError
from molmo_server.app import ModelParts, create_app
from molmo_server.batches.folder import BatchFolder
from molmo_server.checkpoints.configured import first_checkpoint
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.engines import OwnEngines, build_pool
from molmo_server.errors import from_validation
from molmo_server.settings import MolmoSettings, misspelt_variables
from molmo_server.telemetry import configure_logging
from molmo_server.tenancy.databases import without_password
from molmo_server.tenancy.store import KeyStore
from molmo_server.terminal import note, tell
from molmo_server.web.server import server_config

EXIT_OK, EXIT_NO_ENGINE, EXIT_BAD_SETTINGS, EXIT_PORT_TAKEN = 0, 1, 2, 3
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_OTHER_FILES = 256


def serve_command(
    *,
    host: str | None = None,
    port: int | None = None,
    checkpoint: Path | None = None,
    store: str | None = None,
    n_engines: int | None = None,
    engine_urls: str | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    n_threads: int | None = None,
    run_dir: Path | None = None,
    print_config: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Serve a checkpoint on this machine.

    Every option can also be set in the environment, as `MOLMO_PORT=9000`; there are more settings
    than options. Exit codes: 0 ended in order, 1 the engine could not be started, 2 settings,
    checkpoint or file of keys cannot be used, 3 the port is taken.

    Parameters
    ----------
    host
        Address to listen on; 127.0.0.1 unless given. 0.0.0.0 lets other machines in.
    port
        Port to listen on; 8000 unless given, 0 lets the system choose.
    checkpoint
        Folder in the released layout; the packaged molmo2-tiny unless given.
    store
        Store of published checkpoints, a folder or a URL as s3://bucket/models: the current one is
        served, and every later one.
    n_engines
        Engines to start on this machine; one unless given, none where engine_urls names some.
    engine_urls
        Engines that run elsewhere, with commas between them.
    dtype
        Number format of the engine: auto, bfloat16, float32.
    max_model_len
        Most tokens of prompt and answer; what the checkpoint allows unless given.
    n_threads
        On CPU: threads of the engine; all cores, for molmo2-tiny one, unless given.
    run_dir
        Folder for the engine's logs; a temporary one unless given.
    print_config
        Print all settings as they would be used, as JSON without secrets, and end.
    """
    options = {name: value for name, value in locals().items() if name != "print_config"}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        settings = MolmoSettings(**given)
    except ValidationError as error:
        return _complain(EXIT_BAD_SETTINGS, f"settings: {from_validation(error).message}")
    for complaint in misspelt_variables():
        note(f"molmo serve: {complaint}")
    if print_config:
        sys.stdout.write(f"{json.dumps(shown_settings(settings), indent=2)}\n")
        return EXIT_OK
    return run_server(settings)


def shown_settings(settings: MolmoSettings) -> dict[str, object]:
    """All settings by name, keys and passwords hidden."""
    values = settings.model_dump(mode="json")
    return {
        name: without_password(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def run_server(settings: MolmoSettings) -> int:
    """Serve until told to end; returns the exit code."""
    try:
        every = [(one, first_checkpoint(one, tell=note)) for one in settings.of_models()]
        if settings.keys is not None:
            KeyStore(settings.keys).close()
        if settings.batch_dir is not None:
            BatchFolder(settings.batch_dir).close()
    except (BatchStoreError, CheckpointError, KeyStoreError, OSError) as error:
        return _complain(EXIT_BAD_SETTINGS, str(error))
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
    if settings.keys is None and settings.host not in _LOOPBACK:
        note(f"molmo serve: whoever reaches {settings.host} is served; MOLMO_KEYS asks for keys")
    _allow_open_files(settings)
    # Short and private: a socket's path may have 107 characters.
    private = Path(tempfile.mkdtemp(prefix="molmo-"))
    configure_logging(settings.log_level)
    try:
        return uvloop.run(_serve(every, listener, private))
    finally:
        listener.close()
        shutil.rmtree(private, ignore_errors=True)


async def _serve(
    every: list[tuple[MolmoSettings, Checkpoint]], listener: socket.socket, private: Path
) -> int:
    """`every` model's settings and checkpoint, the first one's are the service's."""
    settings = every[0][0]
    log_dir = settings.run_dir or private
    log_dir.mkdir(parents=True, exist_ok=True)
    address = _address(settings.host, listener)
    parts = []
    for one, checkpoint in every:
        prefix = "engine" if one is settings else f"{one.served_name}-engine"
        own = OwnEngines(settings=one, socket_dir=private, log_dir=log_dir, prefix=prefix)
        engines = build_pool(one, checkpoint, own)
        parts.append(ModelParts(settings=one, engines=engines, checkpoint=checkpoint, own=own))
    first, *others = parts
    app = create_app(
        settings,
        first.engines,
        first.checkpoint,
        own=first.own,
        others=others,
        address=address,
    )
    server = _Server(server_config(app, settings), app, leave_notice_s=settings.leave_notice_s)
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not walk through it
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    telling = asyncio.create_task(tell(first.engines, address, every[0][1].id, log_dir))
    await asyncio.wait({serving, telling}, return_when=asyncio.FIRST_COMPLETED)
    has_engine = not telling.done() or telling.result()
    if not has_engine:
        server.should_exit = True
    await serving
    telling.cancel()
    return EXIT_OK if has_engine else EXIT_NO_ENGINE


class _Server(uvicorn.Server):
    """Ends in order at SIGINT and SIGTERM, without uvicorn's raising the signal once more.

    First `/ready` says 503, so that whoever spreads requests sends no more of them here; after
    `leave_notice_s` no connection is taken any more and what was begun is finished.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, *, leave_notice_s: float) -> None:
        super().__init__(config)
        self._app_state = app.state
        self._leave_notice_s = leave_notice_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self._app_state.is_leaving:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        note("molmo: ending; requests in flight may finish (again: end at once)")
        self._app_state.is_leaving = True
        asyncio.get_running_loop().call_later(self._leave_notice_s, self._stop_listening)

    def _stop_listening(self) -> None:
        self.should_exit = True


def _allow_open_files(settings: MolmoSettings) -> None:
    """As many as there may be connections, to callers and to engines, if the system permits."""
    wanted = 2 * settings.max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        note(
            f"molmo serve: {allowed} files may be open, {wanted} are needed for max_connections of "
            f"{settings.max_connections}; raise the limit (ulimit -n) or lower the setting"
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def _address(host: str, listener: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


def _complain(exit_code: int, message: str) -> int:
    note(f"molmo serve: {message}")
    return exit_code
