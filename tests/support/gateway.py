"""A gateway on a real socket in front of a scripted engine on a real Unix socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from molmo_core.tokens import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START
from molmo_server.app import ModelParts, create_app
from molmo_server.checkpoints.configured import first_checkpoint
from molmo_server.engine_pool import (
    EngineAddress,
    EnginePool,
    EngineTiming,
    RemoteEngine,
)
from molmo_server.engine_pool.fake import FakeEngine, serve_fake
from molmo_server.engines import OwnEngines, build_pool
from molmo_server.settings import MolmoSettings
from molmo_server.web.server import server_config

FAST = EngineTiming(
    health_interval_s=0.05, health_timeout_s=2, hang_grace_s=0.5, start_timeout_s=30
)
MAX_MODEL_LEN = 4096


def until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    """Return when `condition` holds; fails when it never does."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not so within {limit_s} s")
        time.sleep(0.01)


def write_folder(folder: Path) -> Path:
    """A checkpoint folder as the gateway reads it: everything but usable weights.

    Token = byte; pictures have few patches, so that token counts stay small.
    """
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"text_config": {"max_position_embeddings": MAX_MODEL_LEN}})
    )
    header = b'{"a": {"dtype": "F32", "shape": [1024], "data_offsets": [0, 4096]}}'
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4096)
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: k for k, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END, *SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"size": {"height": 56, "width": 56}, "patch_size": 14}
    image = {**sizes, "max_crops": 4, "overlap_margins": [0, 0], "pooling_size": [2, 2]}
    video = {**sizes, "pooling_size": [2, 2], "num_frames": 8, "max_fps": 2, "sampling_fps": 2}
    video["frame_sample_mode"] = "uniform_last_frame"
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "processor_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": TURN_END}))
    return folder


@dataclass(kw_only=True)
class RunningGateway:
    url: str
    engine: FakeEngine
    http: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def chat(self, content: Any, **fields: Any) -> httpx2.Response:
        messages = fields.pop("messages", None) or [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def stream_bytes(self, content: Any, **fields: Any) -> bytes:
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            return response.read()

    @contextmanager
    def connection(self) -> Iterator[HTTPConnection]:
        """For what no proper client does."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        caller = HTTPConnection(host, int(port), timeout=60)
        try:
            yield caller
        finally:
            caller.close()

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error of an answer; it must have OpenAI's envelope and nothing else."""
    content = response.json()
    assert list(content) == ["error"]
    assert sorted(content["error"]) == ["code", "message", "param", "type"]
    error: dict[str, Any] = content["error"]
    return error


def assert_refused(
    gateway: RunningGateway, response: httpx2.Response, says: str, status: int = 400
) -> dict[str, Any]:
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert says in error["message"]
    assert gateway.engine.requests == []
    return error


def events_of(stream: bytes) -> list[Any]:
    """The events of a stream; the last must be `[DONE]`, which is left out."""
    lines = [line for line in stream.split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [orjson.loads(line[6:]) for line in lines[:-1]]


@contextmanager
def serve_in_thread(
    settings: MolmoSettings,
    engines: Callable[[], EnginePool],
    own: OwnEngines | None = None,
    others: Callable[[], Sequence[ModelParts]] = tuple,
) -> Iterator[str]:
    """The application on a port of its own, with an event loop of its own; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    # As uvloop has it for `molmo serve`; without it every second answer waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started: list[uvicorn.Server] = []

    async def serve() -> None:
        app = create_app(settings, engines(), own=own, others=others(), address=address)
        config = server_config(app, settings)
        started.append(uvicorn.Server(config))
        await started[0].serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        until(lambda: bool(started) and started[0].started)
        yield address
    finally:
        started[0].should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def serve_own_engines(settings: MolmoSettings, folder: Path) -> Iterator[tuple[str, EnginePool]]:
    """The application with the engines that it starts, their sockets and logs in `folder`: its URL
    and the engines, when one of them is ready."""
    own = OwnEngines(settings=settings, socket_dir=folder, log_dir=folder)
    pools: list[EnginePool] = []

    def engines() -> EnginePool:
        pools.append(build_pool(settings, first_checkpoint(settings), own))
        return pools[0]

    with serve_in_thread(settings, engines, own) as url:
        until(lambda: pools[0].is_ready, settings.start_timeout_s)
        yield url, pools[0]


@contextmanager
def run_fake(engine: FakeEngine, socket_path: Path) -> Iterator[None]:
    """The scripted engine, in a thread and event loop of its own."""
    loop = asyncio.new_event_loop()
    ended, is_up = asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with serve_fake(engine, socket_path):
            is_up.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert is_up.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(timeout=30)
        assert not thread.is_alive()
        loop.close()


@contextmanager
def running_gateway(
    folder: Path | None, sockets: Path, engine: FakeEngine | None = None, **fields: Any
) -> Iterator[RunningGateway]:
    engine = engine or FakeEngine()
    settings = MolmoSettings(checkpoint=folder, **{"drain_s": 0.5, "deadline_s": 20, **fields})
    path = sockets / "engine.sock"

    def engines() -> EnginePool:
        address = EngineAddress(socket=path)
        return EnginePool([RemoteEngine(name="engine-0", address=address, timing=FAST)])

    with run_fake(engine, path), serve_in_thread(settings, engines) as url:
        gateway = RunningGateway(url=url, engine=engine)
        with gateway.http:
            until(gateway.is_ready)
            yield gateway
