"""Which engine is asked, which is trusted, and when patience ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from molmo_core.errors import EngineUnavailable
from molmo_server.engine_pool import EngineAddress, EnginePool, EngineState, RemoteEngine
from molmo_server.engine_pool.fake import FakeEngine, Trick, serve_fake
from tests.server.processes import question
from tests.support.gateway import FAST


def engine_at(socket: Path, *warm_ups: bytes) -> RemoteEngine:
    return RemoteEngine(
        name=socket.stem, address=EngineAddress(socket=socket), timing=FAST, warm_ups=warm_ups
    )


@asynccontextmanager
async def started(*engines: RemoteEngine) -> AsyncIterator[EnginePool]:
    pool = EnginePool(engines)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop(drain_s=0)


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def ask(pool: EnginePool, text: str, deadline_s: float = 20) -> str:
    deadline = asyncio.get_running_loop().time() + deadline_s

    async def body_for(engine: RemoteEngine) -> bytes:
        return question(text)

    with await pool.open(body_for, request_id="r", deadline=deadline, whole=True) as reply:
        content: str = orjson.loads(reply.first)["choices"][0]["message"]["content"]
        return content


async def test_requests_go_to_the_engine_with_the_least_to_do(tmp_path: Path) -> None:
    busy, idle = FakeEngine(default="busy"), FakeEngine(default="idle")
    sockets = [tmp_path / "a.sock", tmp_path / "b.sock"]
    async with (
        serve_fake(busy, sockets[0]),
        serve_fake(idle, sockets[1]),
        started(*map(engine_at, sockets)) as pool,
    ):
        await soon(lambda: all(e.ready.is_set() for e in pool.engines))
        assert await ask(pool, "Hi") == "busy"  # the first in the row, when both have nothing
        hanging = asyncio.create_task(ask(pool, Trick.HANG))
        await soon(lambda: len(busy.requests) == 2)

        assert [await ask(pool, "Hi") for _ in range(3)] == ["idle"] * 3

        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


async def test_an_engine_that_does_not_answer_in_text_is_looked_after_all_the_same(
    tmp_path: Path,
) -> None:
    async def no_text(request: web.Request) -> web.Response:
        return web.Response(body=b"\xcd\xff", content_type="text/plain")

    app = web.Application()
    app.router.add_get("/health", no_text)
    app.router.add_get("/molmo/weights", no_text)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "a.sock")).start()
    try:
        async with started(engine_at(tmp_path / "a.sock")) as pool:
            await soon(lambda: pool.engines[0].state is EngineState.READY)
    finally:
        await runner.cleanup()


async def test_what_cannot_be_read_of_weights_is_a_failure_and_no_other_weights(
    tmp_path: Path,
) -> None:
    tells = ["{", "[]", '"first"', "{}", '{"version": "first"}']

    asked: list[str] = []

    async def weights(request: web.Request) -> web.Response:
        asked.append(tells[0])
        return web.Response(text=tells[0])

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/molmo/weights", weights)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "a.sock")).start()
    engine = engine_at(tmp_path / "a.sock")
    engine.expect("first")
    try:
        async with started(engine):
            while len(tells) > 1:
                await soon(lambda: asked.count(tells[0]) > 1)
                assert engine.state is EngineState.STARTING
                assert "cannot be read" in engine.reason
                del tells[0]
            await soon(lambda: engine.state is EngineState.READY)
            tells.insert(0, "{")
            await soon(lambda: engine.state is EngineState.SUSPECT)
            del tells[0]
            await soon(lambda: engine.state is EngineState.READY)
    finally:
        await runner.cleanup()


async def test_another_engine_answers_for_one_that_breaks(tmp_path: Path) -> None:
    text = Trick.BREAK_FIRST
    good, broken = FakeEngine(requests=[orjson.loads(question(text))]), FakeEngine()
    sockets = [tmp_path / "a.sock", tmp_path / "b.sock"]
    async with (
        serve_fake(broken, sockets[0]),
        serve_fake(good, sockets[1]),
        started(*map(engine_at, sockets)) as pool,
    ):
        await soon(lambda: all(e.ready.is_set() for e in pool.engines))

        assert await ask(pool, text) == good.default
        assert (len(broken.requests), len(good.requests)) == (1, 2)


async def test_an_engine_is_ready_when_it_has_answered_its_warm_ups(tmp_path: Path) -> None:
    fake = FakeEngine(is_healthy=False)
    async with (
        serve_fake(fake, tmp_path / "a.sock"),
        started(engine_at(tmp_path / "a.sock", question("one"), question("two"))) as pool,
    ):
        with pytest.raises(EngineUnavailable, match="a is starting"):
            await ask(pool, "Hi")
        assert fake.requests == []

        fake.is_healthy = True
        await soon(lambda: pool.is_ready)

        assert [r["messages"][0]["content"] for r in fake.requests] == ["one", "two"]


async def test_busy_is_not_dead(tmp_path: Path) -> None:
    """Health is good, a request waits and a short one is not answered: do tokens still come?"""
    fake = FakeEngine()
    engine = engine_at(tmp_path / "a.sock", question("Hi"))
    async with serve_fake(fake, tmp_path / "a.sock"), started(engine) as pool:
        await soon(lambda: pool.is_ready)
        fake.is_wedged = True
        waiting = asyncio.create_task(ask(pool, "Long", deadline_s=60))

        async def generate() -> None:
            while True:
                fake.n_tokens += 1
                await asyncio.sleep(0.02)

        generating = asyncio.create_task(generate())
        await soon(lambda: len(fake.requests) >= 4)  # warm-up, the long one, two probes
        assert engine.state is EngineState.READY

        generating.cancel()
        await soon(lambda: engine.state is not EngineState.READY)
        waiting.cancel()
        await asyncio.gather(generating, waiting, return_exceptions=True)


async def test_an_engine_that_broke_is_looked_at_before_it_is_trusted(tmp_path: Path) -> None:
    fake = FakeEngine()
    engine = engine_at(tmp_path / "a.sock")
    async with serve_fake(fake, tmp_path / "a.sock"), started(engine) as pool:
        await soon(lambda: pool.is_ready)

        engine.suspect()
        assert not pool.is_ready
        # Asked for while suspicion lasts: waits for the look instead of being refused.
        assert await ask(pool, "Hi") == fake.default
        assert pool.is_ready


async def test_an_engine_without_hope_refuses_with_an_estimate(tmp_path: Path) -> None:
    async with started(engine_at(tmp_path / "nowhere.sock")) as pool:
        with pytest.raises(EngineUnavailable) as caught:
            await ask(pool, "Hi")

    assert caught.value.retry_after_s == 1
    assert "nowhere is starting" in caught.value.message


def test_a_pool_needs_engines() -> None:
    with pytest.raises(ValueError, match="at least one engine"):
        EnginePool([])
