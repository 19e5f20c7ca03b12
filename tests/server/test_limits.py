"""What a key may have, by a clock that is moved by hand; what a prompt costs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from molmo_core.errors import RateLimited, TooManyMedia
from molmo_core.images import grid_of, image_tokens
from molmo_core.prompts import Turn
from molmo_core.tokens import IM_PATCH
from molmo_core.videos import video_text
from molmo_server.checkpoints.folder import read_checkpoint
from molmo_server.media.gate import MediaGate
from molmo_server.prompt import measure
from molmo_server.settings import MolmoSettings
from molmo_server.tenancy.callers import Allowance, Caller
from molmo_server.tenancy.store import Key
from tests.server.media import data_url, picture, video


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def allowance(clock: Clock, **limits: int) -> Allowance:
    key = Key(prefix="molmo-abcdef", digest=b"", name="a", scope="infer", created_s=0.0, **limits)
    return Allowance(key, clock_s=clock)


async def ask(allowed: Allowance) -> None:
    async with allowed.request():
        pass


def told(allowed: Allowance, what: str) -> dict[str, str]:
    start = f"x-ratelimit-{{}}-{what}"
    headers = {name.decode(): value.decode() for name, value in allowed.headers()}
    return {k: headers[start.format(k)] for k in ("limit", "remaining", "reset")}


async def test_requests_of_a_minute_come_back_evenly(clock: Clock) -> None:
    allowed = allowance(clock, requests_per_min=3)
    for _ in range(3):
        await ask(allowed)
    with pytest.raises(RateLimited, match="3 requests a minute, this request takes 1") as refused:
        await ask(allowed)
    assert refused.value.retry_after_s == pytest.approx(20)
    assert told(allowed, "requests") == {"limit": "3", "remaining": "0", "reset": "60.000s"}

    clock.now_s += 19.9
    with pytest.raises(RateLimited):
        await ask(allowed)
    clock.now_s += 0.2
    await ask(allowed)
    clock.now_s += 3600
    assert told(allowed, "requests") == {"limit": "3", "remaining": "3", "reset": "0.000s"}


async def test_visual_tokens_are_paid_once_a_request(clock: Clock) -> None:
    allowed = allowance(clock, visual_tokens_per_min=600)
    caller = Caller(allowance=allowed)
    for _ in range(3):  # measured anew for another engine
        await caller.pay(400)
    assert told(allowed, "visual-tokens")["remaining"] == "200"

    with pytest.raises(RateLimited, match="this request takes 400") as refused:
        await Caller(allowance=allowed).pay(400)
    assert refused.value.retry_after_s == pytest.approx(20)
    await Caller(allowance=allowed).pay(200)
    with pytest.raises(TooManyMedia, match="601 visual tokens, this key may send 600 a minute"):
        await Caller(allowance=allowed).pay(601)


def test_several_answers_of_a_request_add_up(clock: Clock) -> None:
    caller = Caller(allowance=allowance(clock))
    caller.note_tokens(prompt=100, visual=80, completion=7)
    caller.note_tokens(prompt=110, visual=80, completion=5)
    usage = caller.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (210, 12)
    assert (usage.requests, usage.visual_tokens) == (1, 80), "of media that were sent once"


async def test_requests_at_the_same_time(clock: Clock) -> None:
    allowed = allowance(clock, n_concurrent=2, requests_per_min=3)
    async with AsyncExitStack() as running:
        await running.enter_async_context(allowed.request())
        await running.enter_async_context(allowed.request())
        with pytest.raises(RateLimited, match="2 requests of this key are being answered"):
            await ask(allowed)
    await ask(allowed)  # and the refused one was not taken from the minute's
    with pytest.raises(RateLimited, match="a minute"):
        await ask(allowed)


async def test_no_limits_no_headers(clock: Clock) -> None:
    free = allowance(clock)
    for _ in range(1000):
        await ask(free)
    await Caller(allowance=free).pay(10**9)
    assert free.headers() == []
    assert Caller().headers() == []


async def test_visual_tokens_of_a_prompt_are_counted(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    gate = MediaGate(MolmoSettings())
    turns = (Turn(role="user", text="Hi"),)

    pictures = await gate.check([data_url(picture()), data_url(picture(200, 20))], [])
    prompt = await measure(turns, pictures, checkpoint)
    blocks = [
        image_tokens(grid_of(size_hw, checkpoint.image), checkpoint.image)
        for size_hw in ((48, 64), (20, 200))
    ]
    assert prompt.n_visual_tokens == sum(block.count(IM_PATCH) for block in blocks) > 8

    clip = await gate.check([], [data_url(video(), "video/mp4")])
    prompt = await measure(turns, clip, checkpoint)
    assert prompt.media.video is not None
    text = video_text(prompt.media.video.frame_times_s, checkpoint.video)
    assert prompt.n_visual_tokens == text.count(IM_PATCH) > 8

    nothing = await measure(turns, await gate.check([], []), checkpoint)
    assert nothing.n_visual_tokens == 0


async def test_the_background_leaves_half_to_others(clock: Clock) -> None:
    has = allowance(clock, requests_per_min=10, visual_tokens_per_min=1000, n_concurrent=1)
    async with has.request(), has.request(is_background=True), has.request(is_background=True):
        for _ in range(2):
            async with has.request(is_background=True):
                pass
        with pytest.raises(RateLimited) as refused:
            async with has.request(is_background=True):
                pytest.fail("half of it is left to others")
        assert refused.value.retry_after_s == pytest.approx(6)
    await ask(has)

    await has.take_visual_tokens(500, is_background=True)
    with pytest.raises(RateLimited):
        await has.take_visual_tokens(1, is_background=True)
    await has.take_visual_tokens(500)
    clock.now_s += 60
    await has.take_visual_tokens(900, is_background=True)  # of a full bucket also more than half
    with pytest.raises(TooManyMedia):
        await has.take_visual_tokens(1001, is_background=True)
