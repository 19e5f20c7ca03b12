"""Half an hour of everything, gateway and real engine: memory and descriptors stay where they are.

Text, pictures, videos, streams, callers who leave, requests that are refused, uploads.
`MOLMO_LONG_RUN_S=240` makes it shorter. What was there after the first quarter, when caches are
filled, is compared with the end; prints a table.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.server.media import data_url, image_part, picture, text_part, video, video_part

DURATION_S = float(os.environ.get("MOLMO_LONG_RUN_S", "1800"))
N_CALLERS = 6
SAMPLE_EVERY_S = 2.0
LASTING_S = 60.0
"""A child that looks at a video lives shorter, the engine's processes longer."""
GROWTH_MIB = {"gateway": 15.0, "engine": 40.0}
"""From after the warm-up to the end, whatever the time between."""
GROWTH_FDS = 8
PICTURES = [picture(60 + 7 * k, 50 + 5 * k) for k in range(16)]
VIDEOS = [video(n_frames=10 + 10 * k) for k in range(4)]


@dataclass(frozen=True, kw_only=True)
class Sample:
    at_s: float
    mib: dict[str, float]
    fds: dict[str, int]
    n_answers: int


@dataclass(kw_only=True)
class Load:
    """Callers who do this and that at random until the time is over."""

    http: aiohttp.ClientSession
    end_s: float
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def call(self, number: int) -> None:
        rng = random.Random(number)
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            *(self.text, self.text, self.point, self.point, self.chat_stream, self.track),
            *(self.leave, self.leave_early, self.refused, self.upload),
        ]
        while time.monotonic() < self.end_s:
            kind = rng.choice(kinds)
            try:
                await kind(rng)
                self.answers[kind.__name__] += 1
            except (aiohttp.ClientError, TimeoutError, AssertionError, KeyError) as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")

    async def text(self, rng: random.Random) -> None:
        await self._chat(f"Say {rng.getrandbits(64)} again", is_stream=False)

    async def chat_stream(self, rng: random.Random) -> None:
        parts = [image_part(rng.choice(PICTURES)), text_part("point: red circle")]
        content = await self._chat(parts, is_stream=True)
        assert content.endswith(b"data: [DONE]\n\n"), content[-200:]

    async def point(self, rng: random.Random) -> None:
        body = {"image_url": data_url(rng.choice(PICTURES)), "object": "circles"}
        answer = await self._post("/v1/point", body | {"max_tokens": 30})
        assert answer["media"][0]["type"] == "image"

    async def track(self, rng: random.Random) -> None:
        body = {"video_url": data_url(rng.choice(VIDEOS), "video/mp4"), "object": "ball"}
        answer = await self._post("/v1/track", body | {"max_tokens": 30})
        assert answer["frames"]

    async def leave(self, rng: random.Random) -> None:
        """In the middle of a stream."""
        parts = [video_part(rng.choice(VIDEOS)), text_part("Describe it")]
        body = _chat_body(parts, is_stream=True)
        async with self.http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 200
            await response.content.readany()

    async def leave_early(self, rng: random.Random) -> None:
        """Before the answer begins."""
        asking = asyncio.create_task(self.text(rng))
        await asyncio.sleep(rng.random() * 0.02)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def refused(self, rng: random.Random) -> None:
        bad = rng.choice(
            [
                ("/v1/point", {"image_url": data_url(rng.randbytes(50)), "object": "x"}),
                ("/v1/track", {"video_url": data_url(VIDEOS[0][:900], "video/mp4"), "object": "x"}),
                ("/v1/chat/completions", _chat_body("<im_start>", is_stream=True)),
                ("/v1/query", {"image_url": data_url(PICTURES[0]), "question": "x " * 9000}),
                ("/v1/caption", {"imag_url": ""}),
            ]
        )
        async with self.http.post(bad[0], json=bad[1]) as response:
            assert response.status == 400, await response.text()

    async def upload(self, rng: random.Random) -> None:
        data = picture(40, 30 + rng.randrange(200))
        kind = {"content-type": "image/png"}
        async with self.http.post("/v1/media", data=data, headers=kind) as response:
            media_id = (await response.json())["id"]
        body = {"image_url": f"media://{media_id}", "max_tokens": 5}
        async with self.http.post("/v1/caption", json=body) as response:
            assert response.status in (200, 404)  # another caller may have removed the same file
        async with self.http.delete(f"/v1/media/{media_id}") as response:
            assert response.status in (200, 404)

    async def _chat(self, content: Any, *, is_stream: bool) -> bytes:
        body = _chat_body(content, is_stream=is_stream)
        async with self.http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            return await response.read()

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.http.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer


def _chat_body(content: Any, *, is_stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "stream": is_stream, "max_tokens": 24, "temperature": 0}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`molmo serve` with the packaged model: its address, and its process."""
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "molmo_client", "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", told)
            assert address is not None, (folder / "errors.txt").read_text()[-3000:]
            yield address.group(), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def sample(gateway: psutil.Process, at_s: float, n_answers: int) -> Sample:
    old = time.time() - LASTING_S
    engine = [one for one in gateway.children(recursive=True) if one.create_time() < old]
    groups = {"gateway": [gateway], "engine": engine}
    return Sample(
        at_s=at_s,
        mib={name: sum(map(_private_mib, group)) for name, group in groups.items()},
        fds={name: sum(p.num_fds() for p in group) for name, group in groups.items()},
        n_answers=n_answers,
    )


def _private_mib(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss) / 2**20


async def run(url: str, gateway: psutil.Process) -> tuple[Load, list[Sample]]:
    timeout = aiohttp.ClientTimeout(total=120)
    began, samples = time.monotonic(), []
    async with aiohttp.ClientSession(url, timeout=timeout) as http:
        load = Load(http=http, end_s=began + DURATION_S)
        calling = asyncio.gather(*(load.call(number) for number in range(N_CALLERS)))
        while not calling.done():
            await asyncio.wait([calling], timeout=SAMPLE_EVERY_S)
            at_s = time.monotonic() - began
            samples.append(sample(gateway, at_s, load.answers.total()))
        await calling
    return load, samples


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 600)
async def test_memory_and_descriptors_stay_flat(tmp_path: Path, show: Callable[..., None]) -> None:
    with served(tmp_path) as (url, gateway):
        load, samples = await run(url, gateway)

    show(*report(load, samples))
    assert load.wrong == []
    for name, allowed_mib in GROWTH_MIB.items():
        mib = growth([s.mib[name] for s in samples])
        fds = growth([s.fds[name] for s in samples])
        assert mib < allowed_mib, f"{name} grew by {mib:.1f} MiB"
        assert fds <= GROWTH_FDS, f"{name} has {fds:.0f} descriptors more"


def growth(figures: list[float] | list[int]) -> float:
    """From the second quarter of the time to the last, in medians."""
    quarter = len(figures) // 4
    return statistics.median(figures[-quarter:]) - statistics.median(figures[quarter : 2 * quarter])


def report(load: Load, samples: list[Sample]) -> list[str]:
    step = max(1, len(samples) // 15)
    rows = [
        f"{s.at_s:6.0f} s  {s.n_answers:7d} answers  gateway {s.mib['gateway']:7.1f} MiB "
        f"{s.fds['gateway']:4d} fds  engine {s.mib['engine']:8.1f} MiB {s.fds['engine']:4d} fds"
        for s in samples[::step]
    ]
    return [*rows, f"{dict(load.answers)}, {len(load.wrong)} wrong"]
