"""Which engine answers, and what happens when it dies while answering.

Before the first byte a broken request is sent once more, to whichever engine is ready within the
deadline; afterwards the caller has part of an answer and is told.

Beside the engines that answer there may be one on trial (`trial`).

Knows: readiness and load of engines. Does not know: bodies, HTTP answers to callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from molmo_core.errors import EngineFailed, EngineUnavailable, MolmoError
from molmo_server.engine_pool.exchange import CHAT_PATH, EngineReply
from molmo_server.engine_pool.remote import EngineState, RemoteEngine
from molmo_server.engine_pool.trial import Trial

logger = logging.getLogger(__name__)

_MARGIN_S = 0.5
"""Waiting for an engine ends so long before the deadline, to say so in time."""
_SUSPICION_S = 2.0
"""A new request waits so long while an engine is being looked at: most often it is well."""
_GONE = (EngineState.FAILED, EngineState.STOPPED)

BodyFor = Callable[[RemoteEngine], Awaitable[bytes]]
"""The request as one engine is asked it: checkpoints may see the same media otherwise."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    body_for: BodyFor
    path: str
    request_id: str
    whole: bool


class EnginePool:
    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self.engines = tuple(engines)
        self.trial: Trial | None = None
        self._exchanged = asyncio.Event()
        """Set when other engines answer than before, and then replaced."""
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start()

    async def stop(self, *, drain_s: float) -> None:
        engines = [*self.engines, *([self.trial.engine] if self.trial else [])]
        await asyncio.gather(*(e.stop(drain_s=drain_s) for e in engines), *self._leaving)

    # --- an engine on trial ---------------------------------------------------------------------

    async def try_out(self, engine: RemoteEngine) -> Trial:
        """Start an engine beside the others; it answers nobody yet.

        Those that are leaving go first: their memory is needed.
        """
        await asyncio.gather(*self._leaving)
        self.trial = Trial(engine=engine)
        await engine.start()
        return self.trial

    def end_trial(self, *, is_chosen: bool, drain_s: float) -> None:
        """The engine on trial takes the place of the others, or leaves.

        Whoever leaves ends what it has begun, for at most `drain_s`; that is not waited for.
        """
        if self.trial is None:
            return
        engine, self.trial = self.trial.engine, None
        leaving = self.engines if is_chosen else (engine,)
        if is_chosen:
            self.engines = (engine,)
            self._exchanged.set()
            self._exchanged = asyncio.Event()
        for one in leaving:
            stopping = one.stop(drain_s=drain_s, reason="another engine takes its place")
            task = asyncio.create_task(stopping, name=f"{one.name} leaves")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    # --- asking ---------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return any(engine.ready.is_set() for engine in self.engines)

    @property
    def has_failed(self) -> bool:
        """No engine is running and none will be started again."""
        return all(engine.state is EngineState.FAILED for engine in self.engines)

    def unavailable(self) -> EngineUnavailable:
        """Why no engine takes requests, as an error."""
        reasons = "; ".join(f"{e.name} is {e.state.value}: {e.reason}" for e in self.engines)
        return EngineUnavailable(
            f"no engine is ready ({reasons}); send the request again later",
            retry_after_s=min(engine.retry_after_s for engine in self.engines),
        )

    def check_hope(self) -> None:
        """Raises EngineUnavailable when a new request had better not queue: no engine soon."""
        hopeful = (EngineState.READY, EngineState.SUSPECT, EngineState.LOADING)
        if not any(engine.state in hopeful for engine in self.engines):
            raise self.unavailable()

    @asynccontextmanager
    async def open(
        self,
        body_for: BodyFor,
        *,
        path: str = CHAT_PATH,
        request_id: str,
        deadline: float,
        whole: bool,
        checkpoint_id: str | None = None,
    ) -> AsyncIterator[EngineReply]:
        """Ask an engine; see `RemoteEngine.open`. `deadline` is a time of the event loop.

        `checkpoint_id`: that of an engine on trial has it asked, any other means the rest. Raises
        EngineUnavailable, EngineFailed, EngineRefused, and what `body_for` raises.
        """
        self.check_hope()
        request = _Request(body_for=body_for, path=path, request_id=request_id, whole=whole)
        latest = deadline - _MARGIN_S
        is_drawn = self.trial is not None and self.trial.answers(checkpoint_id)
        trial = self.trial if is_drawn else None
        async with AsyncExitStack() as stack:
            try:
                if trial is None:
                    engine, reply = await self._ask_serving(request, latest, stack)
                else:
                    is_named = checkpoint_id is not None
                    engine, reply = await self._ask_trial(trial, is_named, request, latest, stack)
            except asyncio.CancelledError:
                if trial is not None and asyncio.get_running_loop().time() >= latest:
                    trial.figures.n_failed += 1  # it kept a caller waiting until the deadline
                raise
            try:
                yield reply
            except (EngineUnavailable, EngineFailed) as error:
                raise self._noted(error, engine) from error

    async def _ask_serving(
        self, request: _Request, latest: float, stack: AsyncExitStack
    ) -> tuple[RemoteEngine, EngineReply]:
        engine, body = await self._prepared(request, self._patience(latest))
        try:
            return engine, await self._ask(engine, body, request, stack)
        except (EngineUnavailable, EngineFailed) as error:
            logger.warning("request %s is sent again: %s", request.request_id, error)
            self._note_failure(engine)
        engine, body = await self._prepared(request, latest)
        try:
            return engine, await self._ask(engine, body, request, stack)
        except (EngineUnavailable, EngineFailed) as error:
            raise self._noted(error, engine) from error

    async def _ask_trial(
        self,
        trial: Trial,
        is_named: bool,
        request: _Request,
        latest: float,
        stack: AsyncExitStack,
    ) -> tuple[RemoteEngine, EngineReply]:
        """Who did not name its checkpoint is answered by another engine when it cannot."""
        trial.figures.n_asked += 1
        try:
            body = await request.body_for(trial.engine)
            return trial.engine, await self._ask(trial.engine, body, request, stack)
        except MolmoError as error:
            is_broken = isinstance(error, (EngineUnavailable, EngineFailed))
            if is_broken:
                self._note_failure(trial.engine)
            if is_named:
                raise
            logger.warning("request %s leaves the engine on trial: %s", request.request_id, error)
        answered = await self._ask_serving(request, latest, stack)
        if not is_broken:  # it refuses what the others take
            trial.figures.n_failed += 1
        return answered

    async def _prepared(self, request: _Request, until: float) -> tuple[RemoteEngine, bytes]:
        """A ready engine, and what it is sent. Raises EngineUnavailable."""
        while True:
            engine = await self._ready_engine(until)
            body = await request.body_for(engine)
            if engine.ready.is_set():  # it may have been held, or have left, meanwhile
                return engine, body

    async def _ask(
        self, engine: RemoteEngine, body: bytes, request: _Request, stack: AsyncExitStack
    ) -> EngineReply:
        began = asyncio.get_running_loop().time()
        asked = engine.open(
            body, path=request.path, request_id=request.request_id, whole=request.whole
        )
        reply = await stack.enter_async_context(asked)
        self._note_answer(engine, asyncio.get_running_loop().time() - began)
        return reply

    @asynccontextmanager
    async def shadow(
        self, trial: Trial, body_for: BodyFor, *, request_id: str
    ) -> AsyncIterator[EngineReply]:
        """Ask the engine on trial what another one has answered, all of it; nobody waits for it.

        Raises EngineUnavailable, EngineFailed, EngineRefused, and what `body_for` raises.
        """
        engine = trial.engine
        try:
            body = await body_for(engine)
            async with engine.open(body, request_id=f"shadow-{request_id}", whole=True) as reply:
                yield reply
        except (EngineUnavailable, EngineFailed):
            self._note_failure(engine)
            raise

    def _note_answer(self, engine: RemoteEngine, seconds: float) -> None:
        if self.trial is not None and self.trial.is_open:
            figures = self.trial.figures
            of = figures.trial_s if engine is self.trial.engine else figures.serving_s
            of.append(seconds)

    def _noted(
        self, error: EngineUnavailable | EngineFailed, engine: RemoteEngine
    ) -> EngineUnavailable | EngineFailed:
        self._note_failure(engine)
        if isinstance(error, EngineUnavailable):
            error.retry_after_s = engine.retry_after_s
        return error

    def _note_failure(self, engine: RemoteEngine) -> None:
        if self.trial is not None and engine is self.trial.engine:
            self.trial.figures.n_failed += 1
        engine.suspect()

    def _patience(self, latest: float) -> float:
        """Until when a new request waits for an engine: a load is waited for, a doubt shortly."""
        if any(engine.is_held for engine in self.engines):
            return latest
        return min(asyncio.get_running_loop().time() + _SUSPICION_S, latest)

    async def _ready_engine(self, until: float) -> RemoteEngine:
        """The least loaded of those that are ready; waits for one until the loop's time `until`.

        Raises EngineUnavailable.
        """
        while not (ready := [engine for engine in self.engines if engine.ready.is_set()]):
            settling = [engine for engine in self.engines if engine.state not in _GONE]
            remaining_s = until - asyncio.get_running_loop().time()
            if not settling or remaining_s <= 0:
                raise self.unavailable()
            events = [*(engine.settled for engine in settling), self._exchanged]
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            try:
                await asyncio.wait(waits, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return min(ready, key=lambda engine: engine.n_in_flight)
