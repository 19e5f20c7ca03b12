"""Who may be served now: a bounded number at work, a bounded number waiting, a deadline for each,
and only as long as the caller is there.

Knows: counts and time. Does not know: what a request is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from molmo_core.errors import Busy, DeadlineExceeded

_BUSY_RETRY_S = 2.0


class Admission:
    def __init__(self, *, max_concurrent: int, max_queued: int, deadline_s: float) -> None:
        self._turns = asyncio.Semaphore(max_concurrent)
        self._max_queued = max_queued
        self._deadline_s = deadline_s
        self.n_queued = 0
        self.n_running = 0

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[float]:
        """Wait for a turn; yields the deadline as time of the event loop.

        Raises Busy when the queue is full, DeadlineExceeded when the time is over, in the queue
        or inside the block.
        """
        if self._turns.locked() and self.n_queued >= self._max_queued:
            raise Busy(
                f"{self.n_running} requests are being answered and {self.n_queued} wait, which is "
                "all this server takes; send it again later",
                retry_after_s=_BUSY_RETRY_S,
            )
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        try:
            async with asyncio.timeout_at(deadline):
                self.n_queued += 1
                try:
                    await self._turns.acquire()
                finally:
                    self.n_queued -= 1
                self.n_running += 1
                try:
                    yield deadline
                finally:
                    self.n_running -= 1
                    self._turns.release()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the answer was not ready after {self._deadline_s:g} s; "
                "ask for fewer tokens or send it again later"
            ) from error


class WhileConnected(Response):
    """An answer that is made while it is sent, and no longer when the caller has gone.

    `work` gets ASGI's `send`. The body of the request must have been read.
    """

    def __init__(self, work: Callable[[Scope, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.ensure_future(self._work(scope, send))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
