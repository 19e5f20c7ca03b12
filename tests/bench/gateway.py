"""What the gateway costs: CPU a stream and time to the first event, beside a direct connection, a
relay that does nothing else (`bare`) and vllm-router.

All ask the same mock engine (`upstream`) in one run, in turn, the order reversed every other
round. The first round is not counted.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import aiohttp
import psutil

from tests.bench.processes import MOLMO, Row, free_port, running, wait_for
from tests.bench.upstream import N_CHUNKS

_N_ROUNDS, _N_STREAMS, _N_AT_ONCE = 6, 48, 4
_BODY_BYTES = 4096


@dataclass(kw_only=True)
class _Way:
    """One way to the engine, and what was seen of it."""

    name: str
    url: str
    process: psutil.Process | None = None
    """What stands between; None: nothing."""
    first_event_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """A stream, by round."""


def rows() -> Iterator[Row]:
    with ExitStack() as stack:
        ways = _ways(stack)
        asyncio.run(_measure(ways))
    direct = statistics.median(ways[0].first_event_ms)
    for way in ways:
        first = statistics.median(way.first_event_ms)
        yield f"{way.name}: first event, median", first, "ms"
        if way.process is not None:
            yield f"{way.name}: first event, more than direct", first - direct, "ms"
            cpu = statistics.median(way.cpu_ms)
            spread = f"ms, rounds {min(way.cpu_ms):.2f} to {max(way.cpu_ms):.2f}"
            yield f"{way.name}: CPU for a stream of {N_CHUNKS} events", cpu, spread


def _ways(stack: ExitStack) -> list[_Way]:
    upstream, gateway, bare, router, router_metrics = (free_port() for _ in range(5))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engine = f"http://127.0.0.1:{upstream}"
    stack.enter_context(running([sys.executable, "-m", "tests.bench.upstream", str(upstream)]))
    wait_for(upstream)
    serve = [str(MOLMO), "serve", "--port", str(gateway), "--engine-urls", engine]
    ours = stack.enter_context(running([*serve, "--checkpoint", str(_long_context(folder))]))
    relay = stack.enter_context(
        running([sys.executable, "-m", "tests.bench.bare", str(bare), engine])
    )
    options = ["--worker-urls", engine, "--policy", "round_robin", "--log-dir", str(folder)]
    options += ["--port", str(router), "--prometheus-port", str(router_metrics)]
    theirs = stack.enter_context(
        running([str(MOLMO.with_name("vllm-router")), "--host", "127.0.0.1", *options])
    )
    for port in (gateway, bare, router):
        wait_for(port)
    return [
        _Way(name="direct", url=engine),
        _Way(name="gateway", url=f"http://127.0.0.1:{gateway}", process=ours),
        _Way(name="bare relay", url=f"http://127.0.0.1:{bare}", process=relay),
        _Way(name="vllm-router", url=f"http://127.0.0.1:{router}", process=theirs),
    ]


def _long_context(folder: Path) -> Path:
    """molmo2-tiny with the context of the released models."""
    packaged = Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
    copy = folder / "long-context"
    shutil.copytree(packaged, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 36_864
    (copy / "config.json").write_text(json.dumps(config))
    return copy


async def _measure(ways: list[_Way]) -> None:
    async with aiohttp.ClientSession() as session:
        for way in ways:
            await _until_ready(session, way)
        for round_ in range(_N_ROUNDS):
            for way in ways if round_ % 2 else reversed(ways):
                began = _cpu_s(way)
                first_event_ms = await _many(session, way)
                if round_:
                    way.first_event_ms += first_event_ms
                    way.cpu_ms.append(1e3 * (_cpu_s(way) - began) / _N_STREAMS)


async def _until_ready(session: aiohttp.ClientSession, way: _Way) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            await _first_event_ms(session, way)
            return
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
    raise RuntimeError(f"{way.name} does not answer")


async def _many(session: aiohttp.ClientSession, way: _Way) -> list[float]:
    async def some() -> list[float]:
        return [await _first_event_ms(session, way) for _ in range(_N_STREAMS // _N_AT_ONCE)]

    many = await asyncio.gather(*(some() for _ in range(_N_AT_ONCE)))
    return [took_ms for one in many for took_ms in one]


async def _first_event_ms(session: aiohttp.ClientSession, way: _Way) -> float:
    """Ask for a stream and read all of it."""
    body = {
        "model": "molmo2",
        "messages": [{"role": "user", "content": "word " * (_BODY_BYTES // 5)}],
        "max_tokens": N_CHUNKS,
        "stream": True,
    }
    began = time.perf_counter()
    async with session.post(f"{way.url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        events = await response.content.readany()
        took_s = time.perf_counter() - began
        events += await response.content.read()
    if b"[DONE]" not in events:
        raise RuntimeError(f"{way.name} did not end its stream")
    return took_s * 1e3


def _cpu_s(way: _Way) -> float:
    """Of all threads, as the scheduler counts: in the hundredths of a second that `psutil` knows a
    round has few."""
    n_ns = 0
    if way.process is not None:
        for thread in Path(f"/proc/{way.process.pid}/task").iterdir():
            with suppress(OSError):  # it has just ended
                n_ns += int((thread / "schedstat").read_text().split()[0])
    return n_ns / 1e9
