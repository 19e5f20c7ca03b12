"""One engine reached over HTTP: whether it answers, and how it is asked.

Knows: vLLM's `/health`, its endpoints and token counters, patience. Does not know: processes
(`supervisor`), other engines (`pool`), what the bodies say.

An engine is ready when `/health` answers 200 and the warm-up requests were answered. A request
that broke makes it suspect: not ready until looked at again. Requests without a byte for longer
than the grace make it prove that it still generates.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import aiohttp
import orjson

from molmo_core.errors import EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.exchange import (
    CHAT_PATH,
    LOST,
    WEIGHTS_PATH,
    EngineAddress,
    EngineReply,
    failure,
    lost_on_the_way,
)

logger = logging.getLogger(__name__)

_TOKEN_COUNTERS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total.*$", re.MULTILINE)


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"  # a request broke or health failed; being looked at
    LOADING = "loading"  # other weights are being loaded; requests wait
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"  # given up
    STOPPED = "stopped"


_SETTLED = {EngineState.READY, EngineState.FAILED, EngineState.STOPPED}


@dataclass(frozen=True, kw_only=True)
class EngineTiming:
    """Seconds; see `MolmoSettings` for what each means."""

    health_interval_s: float = 1.0
    health_timeout_s: float = 5.0
    hang_grace_s: float = 30.0
    start_timeout_s: float = 1200.0


class RemoteEngine:
    """An engine that someone else runs. Use `start` and `stop` inside one event loop."""

    def __init__(
        self,
        *,
        name: str,
        address: EngineAddress,
        timing: EngineTiming,
        warm_ups: tuple[bytes, ...] = (),
    ) -> None:
        self.name = name
        self.checkpoint_id = ""
        """Whose weights it has; empty when it was not told."""
        self.state = EngineState.STARTING
        self.reason = "the engine has not been looked at yet"
        self.n_in_flight = 0
        self.n_restarts = 0
        self.ready = asyncio.Event()
        self.settled = asyncio.Event()
        """Set when ready, and when given up: nothing is to be waited for."""
        self._address = address
        self._timing = timing
        self._warm_ups = warm_ups
        self._wake = asyncio.Event()
        self._must_probe = False
        self._held = self._lost = ""
        self._is_loading = False
        self._loaded_id: str | None = None
        """What we had it load since it was started."""
        self._last_bytes_at = 0.0
        self._session: aiohttp.ClientSession | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def retry_after_s(self) -> float:
        """An estimate of when this engine may be ready."""
        return max(1.0, self._timing.health_interval_s)

    async def start(self) -> None:
        """Begin looking after the engine; returns at once."""
        self._session = aiohttp.ClientSession(
            base_url=self._address.url,
            connector=self._address.connector(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timing.health_timeout_s),
            auto_decompress=False,
        )
        self._task = asyncio.create_task(self._look_after(), name=f"engine {self.name}")
        self._task.add_done_callback(self._not_looked_after)

    async def stop(self, *, drain_s: float, reason: str = "the service is ending") -> None:
        """Take no more requests, let those in flight go on for `drain_s`, then let go."""
        self.set_state(EngineState.DRAINING, reason)
        await self._drain(drain_s)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._let_go()
        if self._session is not None:
            await self._session.close()
        self.set_state(EngineState.STOPPED, reason)

    def suspect(self, *, must_probe: bool = False) -> None:
        """Take no requests until health was checked; with `must_probe` see that it generates."""
        if self.state is not EngineState.READY:
            return
        if must_probe:  # it may merely be slow: others go on until the probe has failed
            self._must_probe = True
        else:
            self.set_state(EngineState.SUSPECT, "a request broke; the engine is being looked at")
        self._wake.set()

    def hold(self, reason: str) -> None:
        """Take no requests until `release`, however well the engine is; those in flight go on."""
        self._held = reason
        if self.state is EngineState.READY:
            self.set_state(EngineState.LOADING, reason)

    @property
    def is_held(self) -> bool:
        return bool(self._held)

    def lose(self, reason: str) -> None:
        """Its weights are unknown: only a new start makes it take requests again."""
        self._lost = reason
        if self.state is not EngineState.FAILED:
            self.set_state(EngineState.SUSPECT, reason)

    def release(self) -> None:
        """Take requests again, when the engine is well."""
        self._held, self._is_loading = "", False
        if self.state is EngineState.LOADING:
            self.set_state(EngineState.READY, "answers")

    def set_state(self, state: EngineState, reason: str) -> None:
        if self._lost and state is EngineState.READY:
            state, reason = EngineState.SUSPECT, self._lost
        if self._held and state is EngineState.READY:
            state, reason = EngineState.LOADING, self._held
        if (state, reason) != (self.state, self.reason):
            logger.info("engine %s: %s, %s", self.name, state.value, reason)
        self.state, self.reason = state, reason
        events = {self.ready: {EngineState.READY}, self.settled: _SETTLED}
        for event, states in events.items():
            event.set() if state in states else event.clear()

    @asynccontextmanager
    async def open(
        self, body: bytes, *, path: str = CHAT_PATH, request_id: str, whole: bool
    ) -> AsyncIterator[EngineReply]:
        """Ask; the first bytes (with `whole` all of them) have arrived when the block begins.

        Raises EngineUnavailable when the connection breaks, EngineFailed for a 5xx, EngineRefused
        for a 4xx.
        """
        assert self._session is not None, "start the engine first"
        headers = {"content-type": "application/json", "x-request-id": request_id}
        response: aiohttp.ClientResponse | None = None
        if self.n_in_flight == 0:
            self._note_bytes()
        self.n_in_flight += 1
        try:
            try:
                response = await self._session.post(path, data=body, headers=headers)
                is_whole = whole or response.status != 200
                content = response.content
                first = await (content.read() if is_whole else content.readany())
            except LOST as error:
                raise lost_on_the_way(error) from error
            if response.status != 200:
                raise failure(response.status, first)
            self._note_bytes()
            yield EngineReply(
                first=first,
                content=content,
                on_bytes=self._note_bytes,
                checkpoint_id=self.checkpoint_id,
            )
        finally:
            self.n_in_flight -= 1
            if response is not None:
                response.close()  # before its end: the engine drops the request

    async def load_weights(self, folder: Path, version: str, *, timeout_s: float) -> None:
        """Have the engine load other weights in place; hold it before.

        Raises EngineRefused when that failed and the engine has its old weights, EngineFailed
        when its weights are unknown, EngineUnavailable when it is lost or takes too long.
        """
        assert self._session is not None, "start the engine first"
        self._is_loading = True
        self._loaded_id = None
        body = {"folder": str(folder), "version": version}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(WEIGHTS_PATH, json=body, timeout=timeout) as response:
                content = await response.read()
        except (*LOST, TimeoutError) as error:
            raise lost_on_the_way(error) from error
        if response.status != 200:
            raise failure(response.status, content)
        self.checkpoint_id = self._loaded_id = version

    async def restart(self) -> None:
        """Begin anew with the checkpoint it was started with; one of others is not ours to."""
        logger.error("engine %s runs elsewhere: start it again there", self.name)

    async def drained(self, drain_s: float) -> bool:
        """Wait until nothing is in flight; False when something still is after `drain_s`."""
        await self._drain(drain_s)
        return self.n_in_flight == 0

    async def metrics(self) -> str:
        """The engine's own metrics; empty when it does not answer."""
        return (await self._get("/metrics"))[1]

    async def _look_after(self) -> None:
        while True:
            self.set_state(EngineState.STARTING, "waiting for the engine's server to answer")
            while not await self._becomes_ready():
                await asyncio.sleep(self._timing.health_interval_s)
            await self._watch()

    def _not_looked_after(self, task: asyncio.Task[None]) -> None:
        """Whatever ended the task unforeseen, it must not look as if all were well."""
        if not task.cancelled() and (error := task.exception()):
            logger.error("engine %s is looked after no more", self.name, exc_info=error)
            self.set_state(EngineState.FAILED, f"an error of the service: {type(error).__name__}")

    async def _becomes_ready(self) -> bool:
        """One look; warms the engine up when its server answers."""
        status, _ = await self._get("/health")
        if status != 200:
            return False
        for body in self._warm_ups:
            if not await self._answers(body):
                return False
        await self._check_answers()
        self.set_state(EngineState.READY, "answers")
        return True

    async def _check_answers(self) -> None:
        """Nothing is known of what an engine of others should answer."""

    async def _watch(self) -> str:
        """Look until the engine is beyond hope; returns why."""
        clock = asyncio.get_running_loop().time
        last_good = clock()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timing.health_interval_s):
                    await self._wake.wait()
            self._wake.clear()
            status, _ = await self._get("/health")
            silence_s = clock() - self._last_bytes_at if self.n_in_flight else 0.0
            must_probe = self._must_probe or silence_s > self._timing.hang_grace_s
            if self._is_loading:  # whoever has it load knows how long that may take, and probes it
                last_good = clock()
                continue
            if status == 200 and not await self._has_what_it_loaded():
                self.lose(
                    "it has other weights than it was told to load; start it and the gateway again"
                )
                return self._lost
            if status == 200 and (not must_probe or await self._generates()):
                self._must_probe = False
                last_good = clock()
                self.set_state(EngineState.READY, "answers")
                continue
            self.set_state(EngineState.SUSPECT, "the engine does not answer as it should")
            if status >= 500:
                return "the engine says that it is dead"
            if clock() - last_good > self._timing.hang_grace_s:
                return f"the engine did not answer for {self._timing.hang_grace_s:g} s"

    async def _has_what_it_loaded(self) -> bool:
        """Whether an engine that we had load other weights has them still."""
        expected = self._loaded_id
        if expected is None:
            return True
        status, text = await self._get(WEIGHTS_PATH)
        if status != 200 or self._loaded_id != expected:
            return True  # it does not say now, or another load has begun meanwhile
        content = orjson.loads(text)
        return isinstance(content, dict) and content.get("version") == expected

    async def _generates(self) -> bool:
        """Whether a short request is answered, or, with much to do, tokens are counted."""
        counted = _TOKEN_COUNTERS.findall(await self.metrics())
        if not self._warm_ups or await self._answers(self._warm_ups[0]):
            self._note_bytes()
            return True
        now = _TOKEN_COUNTERS.findall(await self.metrics())
        return bool(now) and now != counted

    async def _answers(self, body: bytes) -> bool:
        """Whether a request is answered within twice the grace."""
        try:
            async with asyncio.timeout(2 * self._timing.hang_grace_s):
                async with self.open(body, request_id=f"warm-up-{self.name}", whole=True):
                    return True
        except (EngineUnavailable, EngineFailed, EngineRefused, TimeoutError) as error:
            logger.warning("engine %s: a warm-up request failed: %s", self.name, error)
            return False

    async def _get(self, path: str) -> tuple[int, str]:
        """(status, text); status 0 when nothing answers."""
        if self._session is None:
            return 0, ""
        timeout = aiohttp.ClientTimeout(total=self._timing.health_timeout_s)
        try:
            async with self._session.get(path, timeout=timeout) as response:
                return response.status, await response.text()
        except (*LOST, TimeoutError):
            return 0, ""

    def _note_bytes(self) -> None:
        self._last_bytes_at = asyncio.get_running_loop().time()

    async def _drain(self, drain_s: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + drain_s
        while self.n_in_flight and clock() < end:
            await asyncio.sleep(0.05)

    async def _let_go(self) -> None:
        """Nothing to do for an engine that someone else runs."""
