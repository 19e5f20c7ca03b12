"""One engine reached over HTTP: whether it answers, and how it is asked.

Knows: vLLM's `/health`, its endpoints and token counters, patience. Does not know: processes
(`supervisor`), other engines (`pool`, `routing`), what the bodies say.

An engine is ready when `/health` answers 200 and the warm-up requests were answered. A request
that broke makes it suspect: not ready until looked at again. Requests without a byte for longer
than the grace make it prove that it still generates.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import orjson

from molmo_core.errors import EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.answer import LOST, Answer, LastBytes
from molmo_server.engine_pool.breaker import Breaker, Trust
from molmo_server.engine_pool.exchange import (
    CHAT_PATH,
    WEIGHTS_PATH,
    EngineReply,
    check_kind,
    failure,
    lost_on_the_way,
)
from molmo_server.engine_pool.wire import EngineAddress, EngineClient
from molmo_server.telemetry.tracing import trace_headers

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
        self.takes_media_options = False
        """Whether it honours `media.options.engine_fields`; our engines say so."""
        self.media_folder: Path | None = None
        """Where it reads files that are named in a request; None: it takes them inside only."""
        self.state = EngineState.STARTING
        self.reason = "the engine has not been looked at yet"
        self.n_in_flight = 0
        self.n_restarts = 0
        self.breaker = Breaker()
        self.ready = asyncio.Event()
        self.settled = asyncio.Event()
        """Set when ready, and when given up: nothing is to be waited for."""
        self._address = address
        self._timing = timing
        self._warm_ups = warm_ups
        self._wake = asyncio.Event()
        self._must_probe = False
        self._is_doubted = False
        """It is to prove that it still generates."""
        self._held = self._lost = ""
        self._is_loading = self._is_leaving = False
        self._expected_id: str | None = None
        """Whose weights it must have, if it tells: None when that is not known."""
        self._last_bytes = LastBytes()
        self._client: EngineClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Lock()

    @property
    def retry_after_s(self) -> float:
        """An estimate of when this engine may be ready."""
        return max(1.0, self._timing.health_interval_s)

    @property
    def is_avoided(self) -> bool:
        """Asked only when no other engine can be: it breaks, or may be hanging."""
        trust = self.breaker.trust
        is_on_probation = trust is Trust.HALF_OPEN and self.n_in_flight > 0
        return self._is_doubted or is_on_probation or trust is Trust.OPEN

    @property
    def url(self) -> str:
        """Where it is, empty for a Unix socket."""
        return "" if self._address.socket is not None else self._address.url

    async def start(self) -> None:
        """Begin looking after the engine; returns at once. Also after `stop`."""
        self._held = self._lost = ""
        self._is_leaving = False
        self._client = self._new_client()
        self._task = asyncio.create_task(self._look_after(), name=f"engine {self.name}")
        self._task.add_done_callback(self._not_looked_after)

    def _new_client(self) -> EngineClient:
        return EngineClient(self._address, connect_timeout_s=self._timing.health_timeout_s)

    async def stop(self, *, drain_s: float, reason: str = "the service is ending") -> None:
        """Take no more requests, let those in flight go on for `drain_s`, then let go."""
        async with self._stopping:
            await self._stop(drain_s, reason)

    async def start_again(self, *, drain_s: float) -> None:
        """Stop as `stop` does, and start; one of others is looked at as if it were new."""
        async with self._stopping:
            await self._stop(drain_s, "it is to start again")
            self.n_restarts += 1
            await self.start()

    async def steady(self) -> None:
        """Wait until a stop or new start that is going on is done."""
        async with self._stopping:
            pass

    async def _stop(self, drain_s: float, reason: str) -> None:
        if self.state is EngineState.STOPPED:
            return
        self.set_state(EngineState.DRAINING, reason)
        self._is_leaving = True
        await self._drain(drain_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._let_go()
        client, self._client = self._client, None
        if client is not None:
            client.close()
        self.set_state(EngineState.STOPPED, reason)

    def suspect(self, *, must_probe: bool = False) -> None:
        """Take no requests until health was checked; with `must_probe` see that it generates."""
        if self.state is not EngineState.READY:
            return
        if must_probe:  # it may merely be slow: others go on until the probe has failed
            self._must_probe = True
        else:
            self.breaker.fail()  # once, however many requests broke at the same time
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
        if self._is_leaving and state is not EngineState.STOPPED:
            return  # it may be well, and takes no requests all the same
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

    async def open(
        self, body: bytes, *, path: str = CHAT_PATH, request_id: str, whole: bool
    ) -> EngineReply:
        """Ask; the first bytes (with `whole` all of them) have arrived. Ends with its block.

        Raises EngineUnavailable when the connection breaks, EngineFailed for a 5xx, EngineRefused
        for a 4xx.
        """
        if self._client is None:
            raise EngineUnavailable(
                f"engine {self.name} is stopped; send the request again", retry_after_s=1
            )
        headers = {"x-request-id": request_id, **trace_headers()}
        answer: Answer | None = None
        if self.n_in_flight == 0:
            self._note_bytes()
        self.n_in_flight += 1
        try:
            try:
                answer = await self._client.post(path, body, headers, noted=self._last_bytes)
                is_whole = whole or answer.status != 200
                first = await (answer.rest() if is_whole else answer.more())
            except LOST as error:
                raise lost_on_the_way(error) from error
            if answer.status != 200:
                raise failure(answer.status, first)
            check_kind(answer.content_type, whole=whole)
        except BaseException as error:
            if answer is not None:
                answer.close()
            self._note_end(error)
            raise
        reply = EngineReply(first=first, answer=answer, checkpoint_id=self.checkpoint_id)
        reply.at_end.append(self._note_end)
        return reply

    def _note_end(self, _: BaseException | None) -> None:
        self.n_in_flight -= 1

    async def load_weights(self, folder: Path, version: str, *, timeout_s: float) -> None:
        """Have the engine load other weights in place; hold it before.

        Raises EngineRefused when that failed and the engine has its old weights, EngineFailed
        when its weights are unknown, EngineUnavailable when it is lost or takes too long.
        """
        assert self._client is not None, "start the engine first"
        self._is_loading = True
        self._expected_id = None
        body = orjson.dumps({"folder": str(folder), "version": version})
        try:
            async with asyncio.timeout(timeout_s):
                with closing(await self._client.post(WEIGHTS_PATH, body)) as answer:
                    content = await answer.rest()
        except LOST as error:
            raise lost_on_the_way(error) from error
        if answer.status != 200:
            raise failure(answer.status, content)
        self.checkpoint_id = self._expected_id = version

    def expect(self, checkpoint_id: str) -> None:
        """Take requests only with these weights, if it tells which it has."""
        self.checkpoint_id = self._expected_id = checkpoint_id

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
        self.set_state(EngineState.STARTING, "waiting for the engine's server to answer")
        while True:
            while not await self._becomes_ready():
                await asyncio.sleep(self._timing.health_interval_s)
            self.set_state(EngineState.STARTING, await self._watch())
            self._break_off()

    def _break_off(self) -> None:
        """End the requests in flight: another engine may answer those without a byte so far."""
        client, self._client = self._client, self._new_client()
        if client is not None:
            client.close()

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
        try:
            if not await self._has_what_it_should():
                self.set_state(EngineState.STARTING, self._other_weights())
                return False
        except EngineFailed as error:
            self.set_state(EngineState.STARTING, error.message)
            return False
        await self._check_answers()
        self.takes_media_options = await self._says_it_takes_media_options()
        self.set_state(EngineState.READY, "answers")
        return True

    async def _says_it_takes_media_options(self) -> bool:
        status, text = await self._get(WEIGHTS_PATH)
        try:
            content = orjson.loads(text) if status == 200 else {}
        except orjson.JSONDecodeError:
            return False  # not one of ours
        return isinstance(content, dict) and content.get("takes_media_options") is True

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
            silence_s = time.monotonic() - self._last_bytes.at_s if self.n_in_flight else 0.0
            must_probe = self._must_probe or silence_s > self._timing.hang_grace_s
            if self._is_loading:  # whoever has it load knows how long that may take, and probes it
                last_good = clock()
                continue
            try:
                if status == 200 and not await self._has_what_it_should():
                    return self._other_weights()
            except EngineFailed:
                status = 0
            self._is_doubted = must_probe
            if status == 200 and (not must_probe or await self._generates()):
                self._must_probe = self._is_doubted = False
                last_good = clock()
                self.set_state(EngineState.READY, "answers")
                continue
            self.set_state(EngineState.SUSPECT, "the engine does not answer as it should")
            if status >= 500:
                return "the engine says that it is dead"
            if clock() - last_good > self._timing.hang_grace_s:
                return f"the engine did not answer for {self._timing.hang_grace_s:g} s"

    async def _has_what_it_should(self) -> bool:
        """Whether an engine of which that is known has those weights, or does not tell.

        Raises EngineFailed where what it tells cannot be read.
        """
        expected = self._expected_id
        if expected is None or self._lost:  # lost: it takes no requests, whatever it has
            return True
        status, text = await self._get(WEIGHTS_PATH)
        if status != 200 or self._expected_id != expected:
            return True  # it does not say now, or another load has begun meanwhile
        try:
            return bool(orjson.loads(text)["version"] == expected)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise EngineFailed("what the engine tells of its weights cannot be read") from error

    def _other_weights(self) -> str:
        return f"it has other weights than it was told to load; start it with {self._expected_id}"

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
                with await self.open(body, request_id=f"warm-up-{self.name}", whole=True):
                    return True
        except (EngineUnavailable, EngineFailed, EngineRefused, TimeoutError) as error:
            logger.warning("engine %s: a warm-up request failed: %s", self.name, error)
            return False

    async def _get(self, path: str) -> tuple[int, str]:
        """(status, text); status 0 when nothing answers."""
        if self._client is None:
            return 0, ""
        try:
            async with asyncio.timeout(self._timing.health_timeout_s):
                with closing(await self._client.get(path)) as answer:
                    return answer.status, (await answer.rest()).decode(errors="replace")
        except LOST:
            return 0, ""

    def _note_bytes(self) -> None:
        self._last_bytes.at_s = time.monotonic()

    async def _drain(self, drain_s: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + drain_s
        while self.n_in_flight and clock() < end:
            await asyncio.sleep(0.05)

    async def _let_go(self) -> None:
        """Nothing to do for an engine that someone else runs."""
