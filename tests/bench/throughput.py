"""Answers a second of the real engine, through the gateway and asked directly on its socket.

molmo2-tiny with one thread, a new picture in every request, eight callers, answers of 64 tokens.
Both ways are asked in turn, the order reversed every other round; the first round is not counted.
"""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil
from PIL import Image

from molmo_core.scenes import draw_scene, sample_scene
from tests.bench.processes import MOLMO, Row, free_port, running

_N_ROUNDS, _N_ANSWERS, _N_AT_ONCE = 7, 64, 8
_N_TOKENS = 64
_START_S = 300


@dataclass(kw_only=True)
class _Way:
    name: str
    session: aiohttp.ClientSession
    per_s: list[float] = field(default_factory=list)
    first_event_ms: list[float] = field(default_factory=list)


def rows() -> Iterator[Row]:
    port = free_port()
    with running([str(MOLMO), "serve", "--port", str(port)]) as server:
        ways = asyncio.run(_measure(server, port))
    for way in ways:
        first = statistics.median(way.first_event_ms)
        spread = f"answers/s, rounds {min(way.per_s):.1f} to {max(way.per_s):.1f}"
        yield f"{way.name}: throughput", statistics.median(way.per_s), spread
        yield f"{way.name}: first event, median", first, "ms"
    ratios = [ours / direct for direct, ours in zip(*(w.per_s for w in ways), strict=True)]
    spread = f"of direct, rounds {min(ratios):.3f} to {max(ratios):.3f}"
    yield "gateway: throughput", statistics.median(ratios), spread


async def _measure(server: psutil.Process, port: int) -> list[_Way]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
        await _until_ready(gateway)
        connector = aiohttp.UnixConnector(path=_socket_of(server))
        direct = await stack.enter_async_context(
            aiohttp.ClientSession("http://engine", connector=connector)
        )
        ways = [_Way(name="direct", session=direct), _Way(name="gateway", session=gateway)]
        rng = np.random.default_rng(20261124)
        for round_ in range(_N_ROUNDS):
            for way in ways if round_ % 2 else reversed(ways):
                bodies = [_body(rng) for _ in range(_N_ANSWERS)]
                began = time.perf_counter()
                first_event_ms = await _many(way.session, bodies)
                if round_:
                    way.per_s.append(_N_ANSWERS / (time.perf_counter() - began))
                    way.first_event_ms += first_event_ms
        return ways


async def _until_ready(gateway: aiohttp.ClientSession) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        try:
            async with gateway.get("/ready") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass  # it does not listen yet
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the server is not ready after {_START_S} s")


def _socket_of(server: psutil.Process) -> str:
    """Of the engine, from the command that started it."""
    for process in server.children(recursive=True):
        argv = process.cmdline()
        if "--uds" in argv:
            return argv[argv.index("--uds") + 1]
    raise RuntimeError("the server has no engine of its own")


def _body(rng: np.random.Generator) -> dict[str, Any]:
    picture = io.BytesIO()
    Image.fromarray(draw_scene(sample_scene(rng))).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "Describe this image."}
    return {
        "model": "molmo2",
        "messages": [{"role": "user", "content": [image, text]}],
        "max_tokens": _N_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def _many(session: aiohttp.ClientSession, bodies: list[dict[str, Any]]) -> list[float]:
    left = iter(bodies)

    async def some() -> list[float]:
        return [await _first_event_ms(session, body) for body in left]

    many = await asyncio.gather(*(some() for _ in range(_N_AT_ONCE)))
    return [took_ms for one in many for took_ms in one]


async def _first_event_ms(session: aiohttp.ClientSession, body: dict[str, Any]) -> float:
    """Ask for a stream and read all of it."""
    began = time.perf_counter()
    async with session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        events = await response.content.readany()
        took_s = time.perf_counter() - began
        events += await response.content.read()
    if b"[DONE]" not in events:
        raise RuntimeError("a stream did not end as it should")
    return took_s * 1e3
