"""Which engine answers, and what happens when it dies while answering.

Of the engines that are ready `routing` chooses. Before the first byte a broken request is sent once
more, to another engine if one is ready, else to whichever is within the deadline; afterwards the
caller has part of an answer and is told. Engines come and go while others answer.

Beside the engines that answer there may be one on trial (`trial`).

Knows: readiness and load of engines. Does not know: bodies, HTTP answers to callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from molmo_core.errors import EngineFailed, EngineUnavailable, MolmoError
from molmo_server.engine_pool.exchange import CHAT_PATH, EngineReply
from molmo_server.engine_pool.remote import EngineState, RemoteEngine
from molmo_server.engine_pool.routing import choose
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
    latest: float
    """Time of the event loop until which an engine may be waited for."""
    medium: str = ""
    checkpoint_id: str | None = None


class EnginePool:
    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self.engines = tuple(engines)
        self.trial: Trial | None = None
        self._exchanged = asyncio.Event()
        """Set when other engines answer than before, and then replaced."""
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def all_engines(self) -> tuple[RemoteEngine, ...]:
        """Those that answer, and one on trial."""
        return (*self.engines, *([self.trial.engine] if self.trial else []))

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start()

    async def stop(self, *, drain_s: float) -> None:
        leaving = (engine.stop(drain_s=drain_s) for engine in self.all_engines)
        await asyncio.gather(*leaving, *self._leaving)

    # --- engines that come and go -----------------------------------------------------------------

    async def add(self, engine: RemoteEngine) -> None:
        """One more engine, from now on."""
        self._set_engines((*self.engines, engine))
        await engine.start()

    def remove(self, engine: RemoteEngine, *, drain_s: float) -> None:
        """It gets no more requests; see `_let_leave`."""
        self._set_engines(tuple(one for one in self.engines if one is not engine))
        self._let_leave(engine, drain_s, "it was removed")

    def drain(self, engine: RemoteEngine, *, drain_s: float) -> None:
        """As `remove`, but it stays known, and may be started again."""
        self._let_leave(engine, drain_s, "it was drained")

    def start_again(self, engine: RemoteEngine, *, drain_s: float) -> None:
        """What it has begun may go on for at most `drain_s`; that is not waited for."""
        self._in_background(engine.start_again(drain_s=drain_s), f"{engine.name} starts again")

    def _set_engines(self, engines: tuple[RemoteEngine, ...]) -> None:
        self.engines = engines
        self._exchanged.set()
        self._exchanged = asyncio.Event()

    def _let_leave(self, engine: RemoteEngine, drain_s: float, reason: str) -> None:
        """It ends what it has begun, for at most `drain_s`; that is not waited for."""
        stopping = engine.stop(drain_s=drain_s, reason=reason)
        self._in_background(stopping, f"{engine.name} leaves")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # --- an engine on trial ---------------------------------------------------------------------

    async def try_out(self, engine: RemoteEngine) -> Trial:
        """Start an engine beside the others; it answers nobody yet.

        Those that are leaving go first: their memory is needed.
        """
        await asyncio.gather(*self._leaving)
        self.trial = Trial(engine=engine)
        await engine.start()
        return self.trial

    def end_trial(self, *, replaced: RemoteEngine | None, drain_s: float) -> None:
        """The engine on trial takes the place of another one, or, with None, leaves.

        Whoever leaves ends what it has begun, for at most `drain_s`; that is not waited for.
        """
        if self.trial is None:
            return
        engine, self.trial = self.trial.engine, None
        if replaced is not None:
            self._set_engines(tuple(engine if e is replaced else e for e in self.engines))
        self._let_leave(replaced or engine, drain_s, "another engine takes its place")

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

    async def open(
        self,
        body_for: BodyFor,
        *,
        path: str = CHAT_PATH,
        request_id: str,
        deadline: float,
        whole: bool,
        medium: str = "",
        checkpoint_id: str | None = None,
    ) -> EngineReply:
        """Ask an engine; see `RemoteEngine.open`. `deadline` is a time of the event loop.

        `medium` names what the question is about: such questions meet in one engine. Who has the
        weights `checkpoint_id`, also on trial, is asked before others; None asks nobody on trial
        but by lot. Raises EngineUnavailable, EngineFailed, EngineRefused, and what `body_for`
        raises.
        """
        self.check_hope()
        request = _Request(
            body_for=body_for,
            path=path,
            request_id=request_id,
            whole=whole,
            latest=deadline - _MARGIN_S,
            medium=medium,
            checkpoint_id=checkpoint_id,
        )
        if self.trial is not None and self.trial.answers(checkpoint_id):
            return await self._ask_trial(self.trial, request)
        return await self._ask_serving(request)

    async def _ask_serving(self, request: _Request) -> EngineReply:
        engine, body = await self._prepared(request, self._patience(request.latest))
        try:
            return await self._ask(engine, body, request)
        except (EngineUnavailable, EngineFailed) as error:
            logger.warning("request %s is sent again: %s", request.request_id, error)
            self._note_failure(engine)
        engine, body = await self._prepared(request, request.latest)
        try:
            return await self._ask(engine, body, request)
        except (EngineUnavailable, EngineFailed) as error:
            self._note_end(engine, error)
            raise

    async def _ask_trial(self, trial: Trial, request: _Request) -> EngineReply:
        """Who did not name its checkpoint is answered by another engine when it cannot."""
        trial.figures.n_asked += 1
        try:
            body = await request.body_for(trial.engine)
            return await self._ask(trial.engine, body, request)
        except MolmoError as error:
            is_broken = isinstance(error, (EngineUnavailable, EngineFailed))
            if is_broken:
                self._note_failure(trial.engine)
            if request.checkpoint_id is not None:
                raise
            logger.warning("request %s leaves the engine on trial: %s", request.request_id, error)
        reply = await self._ask_serving(request)
        if not is_broken:  # it refuses what the others take
            trial.figures.n_failed += 1
        return reply

    async def _prepared(self, request: _Request, until: float) -> tuple[RemoteEngine, bytes]:
        """A ready engine, and what it is sent. Raises EngineUnavailable."""
        while True:
            engine = await self._ready_engine(request, until)
            body = await request.body_for(engine)
            if engine.ready.is_set():  # it may have been held, or have left, meanwhile
                return engine, body

    async def _ask(self, engine: RemoteEngine, body: bytes, request: _Request) -> EngineReply:
        clock = asyncio.get_running_loop().time
        began = clock()
        asked = engine.open(
            body, path=request.path, request_id=request.request_id, whole=request.whole
        )
        try:
            reply = await asked
        except asyncio.CancelledError:
            if clock() >= request.latest:  # it kept a caller waiting until the deadline
                self._note_overdue(engine)
            raise
        self._note_answer(engine, clock() - began)
        reply.at_end.append(partial(self._note_end, engine))
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
            with await engine.open(body, request_id=f"shadow-{request_id}", whole=True) as reply:
                yield reply
        except (EngineUnavailable, EngineFailed):
            self._note_failure(engine)
            raise

    def _note_answer(self, engine: RemoteEngine, seconds: float) -> None:
        if self.trial is not None and self.trial.is_open:
            figures = self.trial.figures
            of = figures.trial_s if engine is self.trial.engine else figures.serving_s
            of.append(seconds)

    def _note_end(self, engine: RemoteEngine, error: BaseException | None) -> None:
        """Of a request that is not sent again."""
        if error is None:
            engine.breaker.succeed()
        elif isinstance(error, (EngineUnavailable, EngineFailed)):
            self._note_failure(engine)
            if isinstance(error, EngineUnavailable):
                error.retry_after_s = engine.retry_after_s

    def _note_failure(self, engine: RemoteEngine) -> None:
        if self.trial is not None and engine is self.trial.engine:
            self.trial.figures.n_failed += 1
        engine.suspect()

    def _note_overdue(self, engine: RemoteEngine) -> None:
        """It may only be slow, so it is not suspected."""
        if self.trial is not None and engine is self.trial.engine:
            self.trial.figures.n_failed += 1
        engine.breaker.fail()

    def _patience(self, latest: float) -> float:
        """Until when a new request waits for an engine: a load is waited for, a doubt shortly."""
        if any(engine.is_held for engine in self.engines):
            return latest
        return min(asyncio.get_running_loop().time() + _SUSPICION_S, latest)

    async def _ready_engine(self, request: _Request, until: float) -> RemoteEngine:
        """The one to ask of those that are ready; waits for one until the loop's time `until`.

        Raises EngineUnavailable.
        """
        while not (ready := [e for e in self._able(request) if e.ready.is_set()]):
            settling = [engine for engine in self._able(request) if engine.state not in _GONE]
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
        return choose(ready, request.medium)

    def _able(self, request: _Request) -> Sequence[RemoteEngine]:
        """Those with the checkpoint that is named, as long as there are any."""
        named = [engine for engine in self.engines if engine.checkpoint_id == request.checkpoint_id]
        return named or self.engines
