"""Runs batches in the background: which line is next, when to ask again, when a batch is over.

A bounded number of lines is asked at a time, those of different tenants in turn; of one tenant one
batch after the other. What a line is answered is kept before the next one is read, so a server
that is killed goes on where it was: only lines without a kept answer are asked again. Whatever the
store cannot do now it is asked again later, with the answer in hand.

Knows: order, patience. Does not know: how files are kept, how lines are answered (`asking`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

from starlette.types import ASGIApp

from molmo_core.errors import BatchStoreError
from molmo_server.batches.asking import Reply, ask
from molmo_server.batches.files import FileStore
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.jobs import Job, JobStore, Result
from molmo_server.batches.lines import Line, Reading, answered
from molmo_server.batches.results import Ending, end_batch

logger = logging.getLogger(__name__)

Kept = TypeVar("Kept")
Stored = TypeVar("Stored")

_LATER = (429, 503)
"""Not this line's fault: asked again as long as the batch has time."""
_PERHAPS_LATER = (500, 502, 504)
"""Perhaps its fault: some lines break every engine."""
_MAX_BROKEN = 3
_PAUSE_S = 1.0
"""Before a line is asked again, where the answer does not tell how long."""
_LONGEST_PAUSE_S = 15.0
_SWEEP_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    n_concurrent: int
    max_line_bytes: int
    max_lines: int


class Runner:
    """Use between `start` and `stop`, inside one event loop."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        folder: BatchFolder,
        files: FileStore,
        jobs: JobStore,
        limits: Limits,
        on_line: Callable[[bool], None],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`on_line` is told of each answer that is kept whether it is a good one."""
        self._app = app
        self._folder = folder
        self._files = files
        self._jobs = jobs
        self._limits = limits
        self._on_line = on_line
        self._now_s = now_s
        self._room = asyncio.Semaphore(limits.n_concurrent)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By tenant."""
        self._carried: dict[str, asyncio.Task[None]] = {}
        """Batches that have not ended, by id."""
        self._lines: dict[str, asyncio.Task[None]] = {}
        """What answers their lines."""
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def n_unfinished(self) -> int:
        return len(self._carried)

    async def start(self) -> None:
        """Go on with what an earlier run left; raises BatchStoreError."""
        for batch_id in await asyncio.to_thread(self._jobs.unfinished):
            self.take(batch_id)
        self._sweeping = asyncio.create_task(self._sweep(), name="files and batches over time")

    async def stop(self) -> None:
        """Lines in flight are given back: the next start asks them."""
        tasks = [*self._carried.values(), *([self._sweeping] if self._sweeping else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, batch_id: str) -> None:
        """A batch of the store, to its end."""
        task = asyncio.create_task(self._carry(batch_id), name=batch_id)
        self._carried[batch_id] = task
        task.add_done_callback(lambda _: self._carried.pop(batch_id, None))

    def drop_lines(self, batch_id: str) -> None:
        """The batch was cancelled in the store: no line of it goes on."""
        if (lines := self._lines.get(batch_id)) is not None:
            lines.cancel()

    # --- one batch ------------------------------------------------------------------------------

    async def _carry(self, batch_id: str) -> None:
        while True:
            try:
                await self._carry_on(batch_id)
                return
            except (BatchStoreError, OSError) as error:
                logger.error("batch %s waits for its store: %s", batch_id, error)
                await asyncio.sleep(_LONGEST_PAUSE_S)

    async def _carry_on(self, batch_id: str) -> None:
        job = await asyncio.to_thread(self._jobs.job, batch_id)
        reading = self._reading(job)
        if job.batch.status == "validating":
            checked = await asyncio.to_thread(reading.check, job.input_path)
            await asyncio.to_thread(self._jobs.checked, batch_id, *checked)
            job = await asyncio.to_thread(self._jobs.job, batch_id)
        if job.batch.status == "in_progress":
            if await self._answer_in_time(job, reading):
                await asyncio.to_thread(self._jobs.finalize, batch_id)
            job = await asyncio.to_thread(self._jobs.job, batch_id)
        endings: dict[str, Ending] = {
            "in_progress": "expired",
            "finalizing": "completed",
            "cancelling": "cancelled",
        }
        if (ending := endings.get(job.batch.status)) is not None:
            await asyncio.to_thread(
                end_batch, self._folder, self._files, self._jobs, job, ending, reading
            )
        logger.info("batch over", extra={"batch": batch_id, "tenant": job.errand.tenant})

    async def _answer_in_time(self, job: Job, reading: Reading) -> bool:
        """Whether all lines have an answer: the time may be over, the batch be cancelled."""
        batch_id, left_s = job.batch.id, job.batch.expires_at - self._now_s()
        lines = asyncio.create_task(self._answer_lines(job, reading), name=f"lines of {batch_id}")
        self._lines[batch_id] = lines
        try:
            await asyncio.wait({lines}, timeout=max(0.0, left_s))
        finally:
            del self._lines[batch_id]
            lines.cancel()
            await asyncio.wait({lines})
        if lines.cancelled():
            return False
        lines.result()
        return True

    async def _answer_lines(self, job: Job, reading: Reading) -> None:
        async with self._turn_of(job.errand.tenant):
            now = await asyncio.to_thread(self._jobs.job, job.batch.id)
            if now.batch.status != "in_progress":  # cancelled before there was what to drop
                return
            done = await asyncio.to_thread(self._jobs.answered, job.batch.id)
            lines = reading.lines(job.input_path)
            places = asyncio.Semaphore(self._limits.n_concurrent)
            tasks: set[asyncio.Task[None]] = set()
            try:
                while True:
                    await places.acquire()
                    for ended in [task for task in tasks if task.done()]:
                        tasks.remove(ended)
                        ended.result()
                    line = await asyncio.to_thread(_next_line, lines, done)
                    if line is None:
                        break
                    task = asyncio.create_task(self._answer(job, line))
                    tasks.add(task)
                    task.add_done_callback(lambda _: places.release())
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def _turn_of(self, tenant: str) -> AsyncIterator[None]:
        """One batch of a tenant after the other."""
        lock = self._turns.setdefault(tenant, asyncio.Lock())
        async with lock:
            yield

    # --- one line -------------------------------------------------------------------------------

    async def _answer(self, job: Job, line: Line) -> None:
        reply = await self._patient_reply(job, line)
        is_good = reply.status == 200
        text = answered(
            line.custom_id, status=reply.status, request_id=reply.request_id, body=reply.body
        )
        result = Result(line=line.number, is_good=is_good, text=text)
        while True:
            try:
                was_kept = await asyncio.to_thread(self._jobs.keep, job.batch.id, result)
                break
            except BatchStoreError as error:  # the answer is not asked for once more
                logger.error("an answer of %s waits for the store: %s", job.batch.id, error)
                await asyncio.sleep(_LONGEST_PAUSE_S)
        if was_kept:
            self._on_line(is_good)

    async def _patient_reply(self, job: Job, line: Line) -> Reply:
        """The answer of a line, or what is left of it when patience does not help."""
        n_broken = 0
        while True:
            async with self._room:
                reply = await ask(self._app, job.batch.endpoint, line.body, job.errand)
            n_broken += reply.status in _PERHAPS_LATER
            if reply.status not in (*_LATER, *_PERHAPS_LATER) or n_broken == _MAX_BROKEN:
                return reply
            pause_s = reply.retry_after_s or _PAUSE_S
            await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))

    # --- time -----------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Now and then, so that files go at their time also when nobody asks."""
        while True:
            try:
                await asyncio.to_thread(self._files.sweep)
                await asyncio.to_thread(self._jobs.sweep)
            except BatchStoreError as error:
                logger.error("what is over its time stays for now: %s", error.message)
            await asyncio.sleep(_SWEEP_EVERY_S)

    def _reading(self, job: Job) -> Reading:
        return Reading(
            endpoint=job.batch.endpoint,
            max_line_bytes=self._limits.max_line_bytes,
            max_lines=self._limits.max_lines,
        )


def _next_line(lines: Iterator[Line], done: set[int]) -> Line | None:
    """The first one that has no answer."""
    return next((line for line in lines if line.number not in done), None)
