"""Who gets the next turn: tenants one after the other, within a bounded queue."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Scope, Send

from molmo_core.errors import Busy, DeadlineExceeded
from molmo_server.admission import Admission, WhileConnected


class Callers:
    """Requests that are admitted one by one, each when the one before is told to end."""

    def __init__(self, *, max_queued: int = 100, deadline_s: float = 30) -> None:
        self.admission = Admission(max_concurrent=1, max_queued=max_queued, deadline_s=deadline_s)
        self.served: list[str] = []
        self.ends = asyncio.Event()

    async def ask(self, tenant: str, name: str, *, is_background: bool = False) -> None:
        async with self.admission.admit(tenant, is_background=is_background):
            self.served.append(name)
            await self.ends.wait()

    async def queue(
        self, tenant: str, name: str, *, is_background: bool = False
    ) -> asyncio.Task[None]:
        """Ask in a task that waits, or has been refused, when this returns."""
        task = asyncio.create_task(self.ask(tenant, name, is_background=is_background))
        await asyncio.sleep(0)
        return task


async def test_tenants_take_turns_however_many_wait() -> None:
    callers = Callers()
    flood = [await callers.queue("flood", f"f{k}") for k in range(20)]
    others = [await callers.queue("small", "s0"), await callers.queue("small", "s1")]
    others += [await callers.queue("third", "t0")]
    assert callers.admission.n_queued == 22

    callers.ends.set()
    await asyncio.gather(*flood, *others)

    assert callers.served[:7] == ["f0", "f1", "s0", "t0", "f2", "s1", "f3"]
    assert callers.served[7:] == [f"f{k}" for k in range(4, 20)]
    assert (callers.admission.n_running, callers.admission.n_queued) == (0, 0)


async def test_one_tenant_alone_is_served_in_order() -> None:
    callers = Callers()
    tasks = [await callers.queue("", f"{k}") for k in range(5)]
    callers.ends.set()
    await asyncio.gather(*tasks)
    assert callers.served == ["0", "1", "2", "3", "4"]


async def test_a_full_queue_takes_a_place_from_the_tenant_with_most() -> None:
    callers = Callers(max_queued=4)
    flood = [await callers.queue("flood", f"f{k}") for k in range(5)]
    small = [await callers.queue("small", f"s{k}") for k in range(3)]
    callers.ends.set()
    answers = await asyncio.gather(*flood, *small, return_exceptions=True)

    # The latest two of the flood made room; a third of the small tenant would be no fairer.
    assert callers.served == ["f0", "f1", "s0", "f2", "s1"]
    refused = [k for k, answer in enumerate(answers) if isinstance(answer, Busy)]
    assert refused == [3, 4, 7]
    assert [answer for k, answer in enumerate(answers) if k not in refused] == [None] * 5
    assert (callers.admission.n_running, callers.admission.n_queued) == (0, 0)


async def test_of_several_none_fills_the_queue_and_who_asks_seldom_finds_a_place() -> None:
    callers = Callers(max_queued=8)
    first = [await callers.queue("flood", "f0"), await callers.queue("second", "s0")]
    flood = [await callers.queue("flood", f"f{k}") for k in range(1, 20)]
    assert callers.admission.n_queued == 5  # four of the flood, three places are left
    second = [await callers.queue("second", f"s{k}") for k in range(1, 20)]
    third = [await callers.queue("third", f"t{k}") for k in range(20)]
    assert callers.admission.n_queued == 7
    refused = [task.done() for task in (*flood, *second, *third)]  # at once
    assert refused == [*[False] * 4, *[True] * 15, False, *[True] * 18, False, *[True] * 19]

    callers.ends.set()
    await asyncio.gather(*first, *flood, *second, *third, return_exceptions=True)
    assert callers.served == ["f0", "s0", "f1", "t0", "s1", "f2", "f3", "f4"]


async def test_who_leaves_gives_up_the_place_and_also_the_turn() -> None:
    callers = Callers()

    async def ask_and_disturb() -> None:
        await callers.ask("a", "first")
        assert callers.admission.n_queued == 1
        disturbed.cancel()  # it has the turn by now, and has not run since

    first = asyncio.create_task(ask_and_disturb())
    await asyncio.sleep(0)
    disturbed, leaving, last = [await callers.queue("a", name) for name in ("d", "l", "last")]
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert callers.admission.n_queued == 2

    callers.ends.set()
    await asyncio.gather(first, last)

    assert disturbed.cancelled()
    assert callers.served == ["first", "last"]
    assert (callers.admission.n_running, callers.admission.n_queued) == (0, 0)


async def test_waiting_ends_with_the_deadline() -> None:
    callers = Callers(deadline_s=0.05)
    running = await callers.queue("a", "0")
    waiting = await callers.queue("b", "1")
    with pytest.raises(DeadlineExceeded):
        await waiting
    with pytest.raises(DeadlineExceeded):
        await running
    assert callers.served == ["0"]
    assert (callers.admission.n_running, callers.admission.n_queued) == (0, 0)


async def test_the_background_waits_for_everybody_else() -> None:
    callers = Callers(max_queued=2)
    first = await callers.queue("a", "first")
    lines = [await callers.queue("b", f"line{k}", is_background=True) for k in range(40)]
    others = [await callers.queue("a", f"other{k}") for k in range(2)]
    assert callers.admission.n_queued == 2  # the background takes no place of theirs

    callers.ends.set()
    await asyncio.gather(first, *lines, *others)

    assert callers.served == ["first", "other0", "other1", *(f"line{k}" for k in range(40))]
    assert callers.admission.n_running == 0


async def test_the_background_has_a_turn_in_many() -> None:
    callers = Callers()
    tasks = [await callers.queue("a", f"{k}") for k in range(50)]
    tasks += [await callers.queue("b", f"line{k}", is_background=True) for k in range(3)]
    callers.ends.set()
    await asyncio.gather(*tasks)
    assert [callers.served.index(f"line{k}") for k in range(3)] == [16, 32, 48]


async def test_the_time_of_the_background_begins_with_its_turn() -> None:
    callers = Callers(deadline_s=0.2)
    first = await callers.queue("a", "first")
    line = await callers.queue("b", "line", is_background=True)
    with pytest.raises(DeadlineExceeded):
        await first
    assert callers.served == ["first", "line"]
    with pytest.raises(DeadlineExceeded):
        await line


async def test_who_leaves_the_background_leaves_no_gap() -> None:
    callers = Callers()
    first = await callers.queue("a", "first")
    gone = await callers.queue("b", "gone", is_background=True)
    last = await callers.queue("b", "last", is_background=True)
    gone.cancel()
    callers.ends.set()
    await asyncio.gather(first, gone, last, return_exceptions=True)
    assert callers.served == ["first", "last"]
    assert callers.admission.n_running == 0


async def answered_to_nobody(ending: BaseException | None, *, is_stopped: bool = False) -> None:
    """An answer whose caller goes while it is made; `is_stopped`: somebody else stops it too."""
    has_gone = asyncio.Event()

    async def receive() -> Message:
        await has_gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        raise AssertionError("nothing is sent")

    async def work(_: Scope, __: Send) -> None:
        has_gone.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            working = asyncio.current_task()
            assert working is not None
            if is_stopped:
                working.cancel()
            if ending is not None:
                raise ending from None

    await WhileConnected(work)({"type": "http"}, receive, send)


@pytest.mark.parametrize("ending", [None, Busy("no"), asyncio.CancelledError()])
async def test_what_a_caller_who_left_cancels_is_over_with_the_answer(
    ending: BaseException | None,
) -> None:
    this = asyncio.current_task()
    assert this is not None
    if isinstance(ending, Busy):
        with pytest.raises(Busy):
            await answered_to_nobody(ending)
    else:
        await answered_to_nobody(ending)
    assert this.cancelling() == 0


async def test_whoever_else_stops_an_answer_is_not_overheard() -> None:
    stopped = asyncio.create_task(answered_to_nobody(asyncio.CancelledError(), is_stopped=True))
    await asyncio.wait([stopped])
    assert stopped.cancelled()
    assert stopped.cancelling() == 1
