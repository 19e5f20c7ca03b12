"""Engine processes are started, watched, started again and ended, whatever happens to them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from molmo_core.errors import EngineUnavailable
from molmo_server.engine_pool import EnginePool, EngineState, RemoteEngine, SupervisedEngine
from molmo_server.engine_pool.fake import DEFAULT_ANSWER, Trick
from tests.server.processes import child_pid, engine_pid, fake_process, is_alive, question
from tests.support.gateway import until

BODY = question("Hi")


async def body_for(engine: RemoteEngine) -> bytes:
    return BODY


@asynccontextmanager
async def supervised(folder: Path) -> AsyncIterator[SupervisedEngine]:
    engine = fake_process(folder)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(drain_s=1)


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def ready(engine: SupervisedEngine) -> None:
    async with asyncio.timeout(60):
        await engine.ready.wait()


async def test_an_engine_starts_answers_and_ends_in_order(tmp_path: Path) -> None:
    async with supervised(tmp_path) as engine:
        assert engine.state is EngineState.STARTING
        await ready(engine)
        group, first, child = engine.pid, engine_pid(tmp_path), child_pid(tmp_path)
        assert group is not None
        # All of it is one process group in a session of its own: one signal ends it.
        assert os.getpgid(first) == os.getpgid(child) == group != os.getpgid(0)
        assert os.getsid(child) == group
        with await engine.open(BODY, request_id="r1", whole=True) as reply:
            assert orjson.loads(reply.first)["choices"][0]["message"]["content"] == DEFAULT_ANSWER

    assert engine.state is EngineState.STOPPED
    assert "ended in order" in engine.log_tail()
    await soon(lambda: not any(map(is_alive, (group, first, child))))
    assert not (tmp_path / "engine.sock").exists()


@pytest.mark.parametrize("who", ["engine", "its child's parent group", "watchdog"])
async def test_a_killed_engine_is_started_again(tmp_path: Path, who: str) -> None:
    async with supervised(tmp_path) as engine:
        await ready(engine)
        group, first, child = engine.pid, engine_pid(tmp_path), child_pid(tmp_path)
        assert group is not None

        if who == "engine":
            os.kill(first, signal.SIGKILL)
        elif who == "watchdog":
            os.kill(group, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)
        await soon(lambda: not engine.ready.is_set())
        assert engine.retry_after_s >= 1
        await ready(engine)

        assert engine.n_restarts == 1
        await soon(lambda: not any(map(is_alive, (group, first, child))))
        assert is_alive(engine_pid(tmp_path))


async def test_a_hanging_engine_is_killed_with_its_group(tmp_path: Path) -> None:
    async with supervised(tmp_path) as engine:
        await ready(engine)
        group, first, child = engine.pid, engine_pid(tmp_path), child_pid(tmp_path)
        assert group is not None

        os.kill(first, signal.SIGSTOP)  # accepts connections, never answers
        await soon(lambda: engine.n_restarts == 1)
        await ready(engine)

        await soon(lambda: not any(map(is_alive, (group, first, child))))


async def test_an_engine_that_is_healthy_but_answers_nothing_is_killed(tmp_path: Path) -> None:
    async with supervised(tmp_path) as engine:
        await ready(engine)
        first = engine_pid(tmp_path)
        asked = engine.open(question(Trick.WEDGE), request_id="r1", whole=True)
        with pytest.raises(EngineUnavailable, match="lost while answering"):
            await asked

        await soon(lambda: engine.n_restarts == 1 and not is_alive(first))
        await ready(engine)


async def test_a_request_outlives_the_engine_that_it_was_sent_to(tmp_path: Path) -> None:
    engine = fake_process(tmp_path)
    pool = EnginePool([engine])
    await pool.start()
    try:
        await ready(engine)
        os.kill(engine_pid(tmp_path), signal.SIGSTOP)
        deadline = asyncio.get_running_loop().time() + 60
        with await pool.open(body_for, request_id="r1", deadline=deadline, whole=True) as reply:
            assert orjson.loads(reply.first)["choices"][0]["message"]["content"] == DEFAULT_ANSWER
        assert engine.n_restarts == 1
    finally:
        await pool.stop(drain_s=1)


async def test_an_engine_that_cannot_start_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    async with supervised(tmp_path) as engine:
        async with asyncio.timeout(60):
            await engine.settled.wait()

        assert engine.state is EngineState.FAILED
        assert engine.reason == "the engine process ended; given up after 2 starts"
        assert "told to fail while starting" in engine.log_tail()
        assert EnginePool([engine]).has_failed
        assert engine.pid is None


async def test_an_engine_that_has_worked_is_never_given_up(tmp_path: Path) -> None:
    async with supervised(tmp_path) as engine:
        await ready(engine)
        (tmp_path / "fail").touch()
        os.kill(engine_pid(tmp_path), signal.SIGKILL)
        await soon(lambda: engine.n_restarts == 4)
        assert engine.state is not EngineState.FAILED

        (tmp_path / "fail").unlink()
        await ready(engine)


async def test_stopping_while_the_engine_starts(tmp_path: Path) -> None:
    async with supervised(tmp_path) as engine:
        await soon(lambda: engine.pid is not None)
        group = engine.pid
        assert group is not None

    assert engine.state is EngineState.STOPPED
    await soon(lambda: not is_alive(group))


_GATEWAY = """
import asyncio, sys
from pathlib import Path
from tests.server.processes import fake_process
async def main():
    engine = fake_process(Path(sys.argv[1]))
    await engine.start()
    await engine.ready.wait()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_no_orphan_after_the_gateway_is_killed(tmp_path: Path) -> None:
    gateway = subprocess.Popen(
        [sys.executable, "-c", _GATEWAY, str(tmp_path)], stdout=subprocess.PIPE
    )
    with gateway:
        assert gateway.stdout is not None
        assert gateway.stdout.readline() == b"ready\n"
        first, child = engine_pid(tmp_path), child_pid(tmp_path)
        group = os.getpgid(first)
        assert is_alive(first)
        gateway.kill()

    until(lambda: not any(map(is_alive, (group, first, child))))
    assert "the gateway is gone" in (tmp_path / "engine.log").read_text()


def test_a_stopped_engine_does_not_survive_the_gateway(tmp_path: Path) -> None:
    gateway = subprocess.Popen(
        [sys.executable, "-c", _GATEWAY, str(tmp_path)], stdout=subprocess.PIPE
    )
    with gateway:
        assert gateway.stdout is not None
        assert gateway.stdout.readline() == b"ready\n"
        first, child = engine_pid(tmp_path), child_pid(tmp_path)
        os.kill(first, signal.SIGSTOP)
        gateway.kill()

    until(lambda: not any(map(is_alive, (first, child))))
