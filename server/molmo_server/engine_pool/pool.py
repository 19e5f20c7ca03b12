"""Which engine answers, and what happens when it dies while answering.

Before the first byte a broken request is sent once more, to whichever engine is ready within the
deadline; afterwards the caller has part of an answer and is told.

Knows: readiness and load of engines. Does not know: bodies, HTTP answers to callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from molmo_core.errors import EngineFailed, EngineUnavailable
from molmo_server.engine_pool.exchange import EngineReply
from molmo_server.engine_pool.remote import EngineState, RemoteEngine

logger = logging.getLogger(__name__)

_MARGIN_S = 0.5
"""Waiting for an engine ends so long before the deadline, to say so in time."""
_SUSPICION_S = 2.0
"""A new request waits so long while an engine is being looked at: most often it is well."""
_GONE = (EngineState.FAILED, EngineState.STOPPED)


class EnginePool:
    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self.engines = tuple(engines)

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start()

    async def stop(self, *, drain_s: float) -> None:
        await asyncio.gather(*(engine.stop(drain_s=drain_s) for engine in self.engines))

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
        self, body: bytes, *, request_id: str, deadline: float, whole: bool
    ) -> AsyncIterator[EngineReply]:
        """Ask an engine; see `RemoteEngine.open`. `deadline` is a time of the event loop.

        Raises EngineUnavailable, EngineFailed, EngineRefused.
        """
        self.check_hope()
        latest = deadline - _MARGIN_S
        async with AsyncExitStack() as stack:
            engine = await self._ready_engine(self._patience(latest))
            try:
                try:
                    asked = engine.open(body, request_id=request_id, whole=whole)
                    reply = await stack.enter_async_context(asked)
                except (EngineUnavailable, EngineFailed) as error:
                    logger.warning("request %s is sent again: %s", request_id, error)
                    engine.suspect()
                    engine = await self._ready_engine(latest)
                    asked = engine.open(body, request_id=request_id, whole=whole)
                    reply = await stack.enter_async_context(asked)
                yield reply
            except (EngineUnavailable, EngineFailed) as error:
                engine.suspect()
                if isinstance(error, EngineUnavailable):
                    error.retry_after_s = engine.retry_after_s
                raise

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
            waits = [
                asyncio.ensure_future(engine.settled.wait())
                for engine in self.engines
                if engine.state not in _GONE
            ]
            remaining_s = until - asyncio.get_running_loop().time()
            if not waits or remaining_s <= 0:
                raise self.unavailable()
            try:
                await asyncio.wait(waits, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return min(ready, key=lambda engine: engine.n_in_flight)
