"""Two engines, one of which breaks, hangs or talks nonsense: the other answers, and soon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from molmo_core.errors import EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool import EngineAddress, EnginePool, EngineState, RemoteEngine
from molmo_server.engine_pool.breaker import Trust
from molmo_server.engine_pool.fake import FakeEngine, Trick, serve_fake
from molmo_server.engine_pool.routing import ranked
from tests.server.processes import question
from tests.server.test_engine_pool import soon
from tests.support.gateway import FAST

GOOD = "good"


@dataclass(kw_only=True)
class Pair:
    """Two engines of a pool; all media that are asked about belong to the first."""

    pool: EnginePool
    bad: FakeEngine
    good: FakeEngine
    medium: str

    @property
    def bad_engine(self) -> RemoteEngine:
        return self.pool.engines[0]

    async def ask(self, text: str = "Hi", deadline_s: float = 20) -> str:
        async def body_for(engine: RemoteEngine) -> bytes:
            return question(text)

        deadline = asyncio.get_running_loop().time() + deadline_s
        with await self.pool.open(
            body_for, request_id="r", deadline=deadline, whole=True, medium=self.medium
        ) as reply:
            content: str = orjson.loads(reply.first)["choices"][0]["message"]["content"]
            return content


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[Pair]:
    bad, good = FakeEngine(default="bad"), FakeEngine(default=GOOD)
    engines = [
        RemoteEngine(
            name=name,
            address=EngineAddress(socket=folder / f"{name}.sock"),
            timing=FAST,
            warm_ups=(question("warm"),),
        )
        for name in ("bad", "good")
    ]
    media = (str(k) for k in range(1000))
    medium = next(m for m in media if ranked(engines, m)[0].name == "bad")
    pool = EnginePool(engines)
    async with (
        serve_fake(bad, folder / "bad.sock"),
        serve_fake(good, folder / "good.sock"),
    ):
        await pool.start()
        try:
            await soon(lambda: all(engine.ready.is_set() for engine in engines))
            bad.requests.clear()
            good.requests.clear()
            yield Pair(pool=pool, bad=bad, good=good, medium=medium)
        finally:
            await pool.stop(drain_s=0)


async def test_questions_about_a_medium_meet_in_one_engine(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        assert [await two.ask() for _ in range(5)] == ["bad"] * 5
        assert two.good.requests == []


@pytest.mark.parametrize("trick", [Trick.FAIL, Trick.FULL, Trick.PAGE, Trick.NOISE])
async def test_callers_notice_nothing_and_an_engine_that_breaks_is_soon_left_alone(
    tmp_path: Path, trick: Trick
) -> None:
    async with pair(tmp_path) as two:
        two.bad.trick = trick
        breaker = two.bad_engine.breaker
        while breaker.trust is Trust.CLOSED:
            assert await two.ask() == GOOD
        assert len(two.bad.requests) == 3
        assert [await two.ask() for _ in range(5)] == [GOOD] * 5
        assert len(two.bad.requests) == 3  # left alone

        two.bad.trick = ""
        await soon(lambda: breaker.trust is Trust.HALF_OPEN)
        assert await two.ask() == "bad"
        assert breaker.trust is Trust.CLOSED


async def test_while_half_open_it_is_asked_one_at_a_time(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        for _ in range(3):
            two.bad_engine.breaker.fail()
        await soon(lambda: two.bad_engine.breaker.trust is Trust.HALF_OPEN)
        two.bad.seconds_per_piece = 0.2
        trying = asyncio.create_task(two.ask())
        await soon(lambda: len(two.bad.requests) == 1)
        assert [await two.ask() for _ in range(3)] == [GOOD] * 3
        assert await trying == "bad"
        assert await two.ask() == "bad"


async def test_what_callers_do_wrong_is_never_held_against_an_engine(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        for _ in range(5):
            with pytest.raises(EngineRefused):
                await two.ask(Trick.REFUSE)
        assert two.bad_engine.state is EngineState.READY
        assert await two.ask() == "bad"
        assert two.good.requests == []


async def test_a_question_that_breaks_all_engines_does_not_close_the_service(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as two:
        for _ in range(6):
            with pytest.raises(EngineFailed):
                await two.ask(Trick.FAIL)
        await soon(lambda: all(engine.ready.is_set() for engine in two.pool.engines))
        assert await two.ask() in ("bad", GOOD)


async def test_callers_of_a_hanging_engine_are_answered_by_the_other(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        two.bad.is_wedged = True  # its health stays good
        answers = await asyncio.gather(*(two.ask() for _ in range(4)))
        assert answers == [GOOD] * 4
        assert two.bad_engine.state is not EngineState.READY
        assert two.bad.n_dropped > 0


async def test_an_engine_that_may_hang_gets_no_more_requests_while_it_is_asked(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as two:
        two.bad.is_wedged = True
        waiting = asyncio.create_task(two.ask())
        await soon(lambda: two.bad_engine.is_avoided)
        n_asked = len(two.bad.requests)
        assert [await two.ask() for _ in range(5)] == [GOOD] * 5
        assert len(two.bad.requests) - n_asked <= 1  # the short question whether it hangs
        assert await waiting == GOOD


async def test_an_engine_that_answers_in_drops_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        two.bad.seconds_per_piece = 3
        asked = [asyncio.create_task(two.ask()) for _ in range(2)]
        await soon(lambda: len(two.bad.requests) == 2)
        began = asyncio.get_running_loop().time()
        answers = [await two.ask() for _ in range(3)]
        assert asyncio.get_running_loop().time() - began < 2
        assert answers == [GOOD] * 3
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_waiting_until_the_deadline_counts_as_a_failure(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        two.bad.seconds_per_piece = 30
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await two.ask(deadline_s=0.2)
        assert two.bad_engine.breaker.trust is Trust.OPEN
        assert await two.ask() == GOOD


async def test_an_engine_that_is_not_there_is_not_asked(tmp_path: Path) -> None:
    async with serve_fake(FakeEngine(default=GOOD), tmp_path / "good.sock"):
        engines = [
            RemoteEngine(
                name=name, address=EngineAddress(socket=tmp_path / f"{name}.sock"), timing=FAST
            )
            for name in ("nowhere", "good")
        ]
        pool = EnginePool(engines)
        await pool.start()
        await soon(lambda: pool.is_ready)
        two = Pair(pool=pool, bad=FakeEngine(), good=FakeEngine(), medium="")
        for medium in range(20):
            two.medium = str(medium)
            assert await two.ask() == GOOD
        await pool.stop(drain_s=0)


async def test_engines_come_and_go_while_others_answer(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        two.bad.seconds_per_piece = 0.3
        early = asyncio.create_task(two.ask())
        await soon(lambda: len(two.bad.requests) == 1)
        leaving = two.bad_engine
        two.pool.drain(leaving, drain_s=20)
        await soon(lambda: leaving.state is EngineState.DRAINING)
        assert await two.ask() == GOOD
        assert await early == "bad"  # it ended what it had begun
        await soon(lambda: leaving.state is EngineState.STOPPED)
        assert await two.ask() == GOOD
        with pytest.raises(EngineUnavailable, match="bad is stopped"):
            await leaving.open(question("Hi"), request_id="r", whole=True)
        assert await leaving.metrics() == ""

        two.pool.start_again(leaving, drain_s=0)
        await soon(leaving.ready.is_set)
        assert (leaving.n_restarts, await two.ask()) == (1, "bad")

        two.pool.remove(leaving, drain_s=0)
        assert [engine.name for engine in two.pool.engines] == ["good"]
        await soon(lambda: leaving.state is EngineState.STOPPED)
        assert await two.ask() == GOOD


async def test_who_names_a_checkpoint_is_answered_by_an_engine_that_has_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        old, new = two.pool.engines
        old.checkpoint_id, new.checkpoint_id = "old", "new"

        async def body_for(engine: RemoteEngine) -> bytes:
            return question("Hi")

        for named, expected in (("new", "new"), ("old", "old"), ("unknown", "old"), (None, "old")):
            deadline = asyncio.get_running_loop().time() + 20
            asked = two.pool.open(
                body_for,
                request_id="r",
                deadline=deadline,
                whole=True,
                medium=two.medium,
                checkpoint_id=named,
            )
            with await asked as reply:
                assert reply.checkpoint_id == expected
