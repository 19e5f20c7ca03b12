"""Who may be served now: a bounded number at work, a bounded number waiting, a deadline for each,
and only as long as the caller is there.

Tenants who wait take turns, whatever number of requests each of them has there. While there are
several, none may have more requests waiting than places are free: whoever asks too often is told
so at once, and whoever asks seldom finds a place. A tenant alone has the whole queue, and gives up
places, latest first, when another one comes.

Requests in the background (the lines of batches) take a turn when nobody else waits, and one turn
in many when somebody does; their time begins with it.

Knows: counts, time, names of tenants. Does not know: what a request is about.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from molmo_core.errors import Busy, DeadlineExceeded
from molmo_server.web.connections import Leaving, leaving_of

_BUSY_RETRY_S = 2.0
_PRESENT_S = 60.0
"""So long after its last request a tenant still counts as there."""
_BACKGROUND_EVERY = 16
"""One turn of so many is for the background, so that it comes to an end under any load."""


class _Line:
    """Requests that wait: first come, first served within a tenant, in turn between tenants."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}
        """By tenant, next first; of each the oldest first."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def n_of(self, tenant: str) -> int:
        return len(self._waiting.get(tenant, ()))

    def join(self, tenant: str) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, {})[turn] = None
        return turn

    def leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        line = self._waiting.get(tenant, {})
        line.pop(turn, None)
        if not line:
            self._waiting.pop(tenant, None)

    def call_next(self) -> bool:
        """Give a turn to the next one who still wants it; False when nobody does."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            line = self._waiting.pop(tenant)
            turn = next(iter(line))
            del line[turn]
            if line:
                self._waiting[tenant] = line  # behind the other tenants
            if not turn.done():
                turn.set_result(None)
                return True
        return False

    def make_room(self, tenant: str, refusal: Busy) -> bool:
        """Refuse the latest of the tenant who has most, if that is fairer than to refuse `tenant`.

        Fairer: also with the place given away it has as many as `tenant` then.
        """
        greedy = max(self._waiting, key=self.n_of, default=tenant)
        if self.n_of(greedy) < self.n_of(tenant) + 2:
            return False
        latest = next(reversed(self._waiting[greedy]))
        self.leave(greedy, latest)
        if not latest.done():
            latest.set_exception(refusal)
        return True


class _Presence:
    """Whether a tenant is alone; remembers the last two who asked."""

    def __init__(self) -> None:
        self._last, self._other = ("", -math.inf), ("", -math.inf)
        """(tenant, when) of the last request, and of the last one of anybody else."""

    def is_alone(self, tenant: str, now_s: float) -> bool:
        """Note a request of `tenant`; whether nobody else asked lately."""
        if tenant != self._last[0]:
            self._other = self._last
        self._last = (tenant, now_s)
        return now_s - self._other[1] > _PRESENT_S


class Admission:
    def __init__(self, *, max_concurrent: int, max_queued: int, deadline_s: float) -> None:
        self._line = _Line()
        self._presence = _Presence()
        self._background = _Line()
        self._n_turns = 0
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._deadline_s = deadline_s
        self.n_running = 0

    @property
    def n_queued(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def admit(self, tenant: str = "", *, is_background: bool = False) -> AsyncIterator[float]:
        """Wait for a turn; yields the deadline as time of the event loop.

        Raises Busy when the queue is full, DeadlineExceeded when the time is over, in the queue
        or inside the block; in the background only inside the block.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + self._deadline_s
        try:
            async with asyncio.timeout_at(None if is_background else deadline) as limit:
                await self._wait(tenant, is_background)
                if is_background:
                    deadline = now() + self._deadline_s
                    limit.reschedule(deadline)
                try:
                    yield deadline
                finally:
                    self._pass_on()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the answer was not ready after {self._deadline_s:g} s; "
                "ask for fewer tokens or send it again later"
            ) from error

    async def _wait(self, tenant: str, is_background: bool) -> None:
        """Return with a turn, which is counted as running."""
        now_s = asyncio.get_running_loop().time()
        is_alone = not is_background and self._presence.is_alone(tenant, now_s)
        if self.n_running < self._max_concurrent:
            self.n_running += 1
            return
        line = self._background if is_background else self._line
        if not is_background and not self._has_place(tenant, is_alone):
            raise self._busy()
        turn = line.join(tenant)
        try:
            await turn
        except asyncio.CancelledError:
            line.leave(tenant, turn)
            if not turn.cancelled() and turn.exception() is None:
                self._pass_on()  # the turn came at the same moment
            raise

    def _has_place(self, tenant: str, is_alone: bool) -> bool:
        n_free = self._max_queued - self.n_queued
        if n_free <= 0:
            return self._line.make_room(tenant, self._busy())
        return is_alone or self._line.n_of(tenant) < n_free

    def _pass_on(self) -> None:
        self._n_turns += 1
        lines = [self._line, self._background]
        if self._n_turns % _BACKGROUND_EVERY == 0:
            lines.reverse()
        if not any(line.call_next() for line in lines):
            self.n_running -= 1

    def _busy(self) -> Busy:
        return Busy(
            f"{self.n_running} requests are being answered and {self.n_queued} wait, which is "
            "all this server takes now; send it again later",
            retry_after_s=_BUSY_RETRY_S,
        )


class WhileConnected(Response):
    """An answer that is made while it is sent, and no longer when the caller has gone.

    `work` gets ASGI's `send`. The body of the request must have been read.
    """

    def __init__(self, work: Callable[[Scope, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.current_task()
        assert working is not None, "an application answers in tasks"
        watching = None
        if (leaving := leaving_of(scope)) is None:
            leaving = Leaving()
            watching = asyncio.ensure_future(_watch(receive, leaving))
        if leaving.has_left:
            return
        leaving.tell(working.cancel)
        try:
            await self._work(scope, send)
        except asyncio.CancelledError:
            if not leaving.has_left or working.cancelling() > 1:  # somebody else wants it to end
                raise
        finally:
            leaving.tell_no_more(working.cancel)
            if leaving.has_left:  # it was told once, however the work ended
                working.uncancel()
            if watching is not None:
                watching.cancel()


async def _watch(receive: Receive, leaving: Leaving) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leaving.note()
