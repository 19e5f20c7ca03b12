"""Questions about the same videos again and again, over two real engines: routed by the medium
against in turn.

The caches of one engine hold eleven of eighteen videos, as they do where a service has more media
than room: those of two engines hold them all, if no video is in both. Both ways ask the same
questions of the same engines, in turns, each after a round through all videos that is not counted.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import orjson

from molmo_server.engine_pool import (
    EngineAddress,
    EnginePool,
    EngineReply,
    EngineTiming,
    RemoteEngine,
)
from tests.bench.processes import Row
from tests.support.checkpoint import TINY
from tests.support.conversations import draw_video
from tests.support.engine import Wanted, engines_side_by_side

N_VIDEOS, N_HELD = 18, 11
N_ROUNDS, N_QUESTIONS, N_CALLERS = 5, 96, 8
_BYTES_PER_VIDEO = 24 * 81 * 588  # frames, patches, bytes of a patch
_DECODED_BYTES = 24 * 126 * 126 * 3
_N_BLOCKS = 3 * N_HELD + N_CALLERS // 2
"""Of 128 tokens: a video has three full ones, and each request one more while it is answered."""


@dataclass(frozen=True, kw_only=True)
class Video:
    medium: str
    url: str

    def question(self, number: int) -> bytes:
        text = f"Is it the {number}th time?"
        content = [
            {"type": "video_url", "video_url": {"url": self.url}},
            {"type": "text", "text": text},
        ]
        messages = [{"role": "user", "content": content}]
        return orjson.dumps(
            {"model": "molmo2", "messages": messages, "max_tokens": 4, "temperature": 0}
        )


Ask = Callable[[Video, bytes], Awaitable[EngineReply]]


@dataclass(kw_only=True)
class Way:
    """How one way of routing did, round by round."""

    rates: list[float] = field(default_factory=list)
    """Questions a second."""
    n_found: int = 0
    n_asked: int = 0

    @property
    def found(self) -> float:
        """Percent of the questions for which the engine had the video's keys and values."""
        return 100 * self.n_found / self.n_asked


def rows() -> Iterator[Row]:
    """Questions a second both ways, and their ratio; starts two engines of molmo2-tiny."""
    held = {
        "media_cache_gib": N_HELD * _BYTES_PER_VIDEO / 2**30,
        "frame_cache_gib": N_HELD * _DECODED_BYTES / 2**30,
        "max_model_len": 1024,
        "extra_arguments": ("--num-gpu-blocks-override", str(_N_BLOCKS)),
    }
    wanted = Wanted(checkpoint=TINY, fields=held)
    names = ("engine-0", "engine-1")
    videos = [_video(seed) for seed in range(N_VIDEOS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        engines_side_by_side(dict.fromkeys(names, wanted), Path(folder)) as engines,
    ):
        sockets = {name: engine.socket for name, engine in engines.items()}
        by_medium, in_turn = asyncio.run(_compare(sockets, videos))
    what = f"questions about {N_VIDEOS} videos, {N_HELD} fit into an engine"
    for name, way in (("by medium", by_medium), ("in turn", in_turn)):
        yield f"{what}: {name}", statistics.median(way.rates), "/s"
        yield "  video found in a cache", way.found, "%"
    medians = [statistics.median(way.rates) for way in (by_medium, in_turn)]
    yield "by medium against in turn", medians[0] / medians[1], "times"
    ratios = [a / b for a, b in zip(by_medium.rates, in_turn.rates, strict=True)]
    yield "  least of the rounds", min(ratios), "times"
    yield "  most of the rounds", max(ratios), "times"


def _video(seed: int) -> Video:
    """24 frames of it are seen."""
    data = draw_video(Fraction(4), 48, seed, (640, 360))
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return Video(medium=sha256(data).hexdigest(), url=url)


async def _compare(sockets: dict[str, Path], videos: list[Video]) -> tuple[Way, Way]:
    """By medium, in turn."""
    engines = [
        RemoteEngine(name=name, address=EngineAddress(socket=socket), timing=EngineTiming())
        for name, socket in sockets.items()
    ]
    pool = EnginePool(engines)
    await pool.start()
    await asyncio.gather(*(engine.ready.wait() for engine in engines))
    turns = itertools.cycle(engines)

    async def by_medium(video: Video, body: bytes) -> EngineReply:
        async def body_for(engine: RemoteEngine) -> bytes:
            return body

        deadline = asyncio.get_running_loop().time() + 120
        asked = pool.open(
            body_for, request_id="bench", deadline=deadline, whole=True, medium=video.medium
        )
        with await asked as reply:
            return reply

    async def in_turn(video: Video, body: bytes) -> EngineReply:
        with await next(turns).open(body, request_id="bench", whole=True) as reply:
            return reply

    ways: dict[Ask, Way] = {by_medium: Way(), in_turn: Way()}
    numbers = itertools.count()
    for number in range(N_ROUNDS):
        drawn = random.Random(number)
        asked = [drawn.choice(videos) for _ in range(N_QUESTIONS)]
        for ask in (by_medium, in_turn) if number % 2 == 0 else (in_turn, by_medium):
            await _ask_all(ask, videos, numbers)
            began = time.perf_counter()
            n_found = await _ask_all(ask, asked, numbers)
            ways[ask].rates.append(len(asked) / (time.perf_counter() - began))
            ways[ask].n_found += n_found
            ways[ask].n_asked += len(asked)
    await pool.stop(drain_s=0)
    return ways[by_medium], ways[in_turn]


async def _ask_all(ask: Ask, videos: list[Video], numbers: Iterator[int]) -> int:
    """A new question about each, by a few callers side by side; how many found their video."""
    waiting, n_found = iter(videos), 0

    async def call() -> None:
        nonlocal n_found
        for video in waiting:
            reply = await ask(video, video.question(next(numbers)))
            usage = orjson.loads(reply.first)["usage"]
            n_found += bool(usage["prompt_tokens_details"]["cached_tokens"])

    await asyncio.gather(*(call() for _ in range(N_CALLERS)))
    return n_found
