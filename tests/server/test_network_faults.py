"""A network that fails, between the client and the gateway and between the gateway and its engine:
every caller has an answer or an error in time, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from molmo_client.client import AsyncClient
from molmo_client.retries import RetryPolicy
from molmo_core import api
from molmo_core.errors import MolmoError
from molmo_server.app import create_app
from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
from molmo_server.engine_pool.fake import DEFAULT_ANSWER, FakeEngine, serve_fake
from molmo_server.settings import MolmoSettings
from tests.server.media import picture
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.gateway import FAST, events_of

DEADLINE_S = 1.0
LATE_S = 10.0
"""How long after the deadline an answer may still come, on a machine that does other things."""
FAULTS = [fault for fault in Fault if fault is not Fault.NONE]

CODES = ("engine_unavailable", "engine_failed", "deadline_exceeded")


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, kw_only=True)
class Network:
    """Client → `to_gateway` → gateway → `to_engine` → scripted engine."""

    gateway_url: str
    to_gateway: FaultyProxy
    to_engine: FaultyProxy


@asynccontextmanager
async def network(folder: Path, scratch: Path) -> AsyncIterator[Network]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serve_fake(FakeEngine(), scratch / "engine.sock"))
        to_engine = await stack.enter_async_context(faulty_proxy(scratch / "engine.sock"))
        address = EngineAddress(url=to_engine.url)
        engines = EnginePool([RemoteEngine(name="engine-0", address=address, timing=FAST)])
        settings = MolmoSettings(checkpoint=folder, deadline_s=DEADLINE_S, drain_s=0)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            create_app(settings, engines), log_config=None, timeout_graceful_shutdown=1
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        to_gateway = await stack.enter_async_context(faulty_proxy(port))
        try:
            url = f"http://127.0.0.1:{port}"
            await _ready(url)
            yield Network(gateway_url=url, to_gateway=to_gateway, to_engine=to_engine)
        finally:
            server.should_exit = True
            await serving
            listener.close()


async def _ready(url: str) -> None:
    async with asyncio.timeout(20), httpx2.AsyncClient(base_url=url) as http:
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)


async def ask(url: str, *, is_stream: bool) -> tuple[int, list[Any]]:
    """(status, events or the one body); an answer that is none of both fails."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": is_stream}
    began = time.monotonic()
    async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert time.monotonic() - began < DEADLINE_S + LATE_S
    is_events = response.headers["content-type"].startswith("text/event-stream")
    return response.status_code, events_of(response.content) if is_events else [response.json()]


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Tasks and descriptors at the end are those of the beginning."""

    def open_now() -> tuple[int, int]:
        return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

    before = open_now()
    yield
    async with asyncio.timeout(10):
        while any(now > then for now, then in zip(open_now(), before, strict=True)):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("fault", FAULTS)
async def test_between_gateway_and_engine(folder: Path, tmp_path: Path, fault: Fault) -> None:
    async with nothing_left(), network(folder, tmp_path) as net:
        assert (await ask(net.gateway_url, is_stream=False))[0] == 200
        net.to_engine.fault = fault
        answers = await asyncio.gather(
            *(ask(net.gateway_url, is_stream=is_stream) for is_stream in (False, True) * 2)
        )
        for status, content in answers:
            last = content[-1]
            if fault is Fault.LATE:
                assert status == 200
                assert "error" not in last
            elif fault is not Fault.REFUSED or status != 200:  # connections that are there go on
                assert status in (200, 502, 503, 504)
                assert "error" in last, (status, content)
                assert last["error"]["code"] in CODES
        net.to_engine.fault = Fault.NONE
        await _ready(net.gateway_url)
        status, content = await ask(net.gateway_url, is_stream=False)
        assert (status, content[0]["choices"][0]["message"]["content"]) == (200, DEFAULT_ANSWER)


@pytest.mark.parametrize("fault", FAULTS)
async def test_between_client_and_gateway(folder: Path, tmp_path: Path, fault: Fault) -> None:
    retries = RetryPolicy(n_retries=1, first_delay_s=0.05)
    async with nothing_left(), network(folder, tmp_path) as net:
        net.to_gateway.fault = fault
        began = time.monotonic()
        async with AsyncClient(
            net.to_gateway.url, answer_timeout_s=DEADLINE_S, retries=retries
        ) as client:
            got = (await asyncio.gather(client.point(picture(), "x"), return_exceptions=True))[0]
            assert time.monotonic() - began < 2 * DEADLINE_S + LATE_S
            if fault is Fault.LATE:
                assert isinstance(got, api.PointAnswer)
            else:
                assert isinstance(got, MolmoError), got
            net.to_gateway.fault = Fault.NONE
            assert (await client.point(picture(), "x")).count == 1
