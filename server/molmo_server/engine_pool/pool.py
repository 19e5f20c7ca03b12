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
from molmo_server.engine_pool.remote import EngineReply, EngineState, RemoteEngine

logger = logging.getLogger(__name__)

_MARGIN_S = 0.5
"""Waiting for an engine ends so long before the deadline, to say so in time."""


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

    @asynccontextmanager
    async def open(
        self, body: bytes, *, request_id: str, deadline: float, whole: bool
    ) -> AsyncIterator[EngineReply]:
        """Ask an engine; see `RemoteEngine.open`. `deadline` is a time of the event loop.

        Raises EngineUnavailable, EngineFailed, EngineRefused.
        """
        async with AsyncExitStack() as stack:
            engine = self._least_loaded()
            try:
                try:
                    asked = engine.open(body, request_id=request_id, whole=whole)
                    reply = await stack.enter_async_context(asked)
                except (EngineUnavailable, EngineFailed) as error:
                    logger.warning("request %s is sent again: %s", request_id, error)
                    engine.suspect()
                    engine = await self._wait_for_engine(deadline)
                    asked = engine.open(body, request_id=request_id, whole=whole)
                    reply = await stack.enter_async_context(asked)
            except EngineUnavailable as error:
                engine.suspect()
                error.retry_after_s = engine.retry_after_s
                raise
            except asyncio.CancelledError:
                if asyncio.get_running_loop().time() >= deadline:
                    engine.suspect(must_probe=True)  # not one byte in all that time
                raise
            try:
                yield reply
            except EngineUnavailable:
                engine.suspect()
                raise

    def _least_loaded(self) -> RemoteEngine:
        ready = [engine for engine in self.engines if engine.ready.is_set()]
        if not ready:
            raise self.unavailable()
        return min(ready, key=lambda engine: engine.n_in_flight)

    async def _wait_for_engine(self, deadline: float) -> RemoteEngine:
        waits = [asyncio.ensure_future(engine.settled.wait()) for engine in self.engines]
        try:
            async with asyncio.timeout_at(deadline - _MARGIN_S):
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise self.unavailable() from None
        finally:
            for wait in waits:
                wait.cancel()
        return self._least_loaded()
