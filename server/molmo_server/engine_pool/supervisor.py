"""An engine whose process is ours: started, watched, started again, ended.

The process tree is gateway → watchdog → engine and its children. Watchdog and engine share a
session and process group, so one SIGKILL to the group ends all of it; when the gateway dies the
watchdog does the same. Restarts wait longer each time (exponential back-off).

Knows: processes, signals, the log file. Does not know: what the command starts (`engine.launch`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_server.engine_pool import watchdog
from molmo_server.engine_pool.remote import EngineState, EngineTiming, RemoteEngine
from molmo_server.engine_pool.wire import EngineAddress

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_FIRST_START_S = 30.0
"""Guess for `Retry-After` until one start was measured."""
_EXIT_GRACE_S = 3.0
"""An engine that is told to end has nothing in flight; afterwards it is killed."""
_TAIL_LINES = 20
_TAIL_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class EngineProcess:
    """How one engine process is started."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the gateway's own."""
    socket: Path
    log: Path
    examine: Callable[[RemoteEngine], Awaitable[list[str]]] | None = None
    """Says what is wrong with what it answers, before it takes requests."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    first_backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    max_failed_starts: int = 3
    """Starts that fail in a row before the first success; later ones are tried for ever."""

    def backoff_s(self, n_failures: int) -> float:
        """Wait after the `n_failures`-th failure in a row."""
        return min(self.first_backoff_s * 2.0 ** max(n_failures - 1, 0), self.longest_backoff_s)


class _Unfit(Exception):
    """It started and does not answer as it should."""


class SupervisedEngine(RemoteEngine):
    def __init__(
        self,
        *,
        name: str,
        process: EngineProcess,
        timing: EngineTiming,
        restarts: RestartPolicy,
        warm_ups: tuple[bytes, ...] = (),
        devices: str = "",
    ) -> None:
        """`devices`: what the process sees as CUDA_VISIBLE_DEVICES; empty: what this one sees."""
        address = EngineAddress(socket=process.socket)
        super().__init__(name=name, address=address, timing=timing, warm_ups=warm_ups)
        self.devices = devices
        self._how = process
        self._restarts = restarts
        self._process: Process | None = None
        self._start_took_s = _FIRST_START_S
        self._expected_at = 0.0

    @property
    def pid(self) -> int | None:
        """Process group of watchdog and engine, None when nothing runs."""
        return self._process.pid if self._process is not None else None

    @property
    def retry_after_s(self) -> float:
        return min(max(self._expected_at - asyncio.get_running_loop().time(), 1.0), 60.0)

    def adopt(self, process: EngineProcess) -> None:
        """Start so from the next start on; the running process is left as it is."""
        self._how = process

    async def restart(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _look_after(self) -> None:
        clock = asyncio.get_running_loop().time
        n_failures = 0
        has_been_ready = False
        while True:
            self.set_state(EngineState.STARTING, "the engine process is starting")
            started_at = clock()
            self._expected_at = started_at + self._start_took_s
            why = await self._until_ready()
            if why is None:
                ready_at, has_been_ready = clock(), True
                self._start_took_s = ready_at - started_at
                logger.info("engine %s is ready after %.1f s", self.name, self._start_took_s)
                why = await self._until_exit_or(self._watch())
                if clock() - ready_at > self._restarts.longest_backoff_s:
                    n_failures = 0
            else:
                logger.error("engine %s did not start: %s\n%s", self.name, why, self.log_tail())
            await self._kill()
            n_failures += 1
            if not has_been_ready and n_failures >= self._restarts.max_failed_starts:
                self.set_state(EngineState.FAILED, f"{why}; given up after {n_failures} starts")
                return
            wait_s = self._restarts.backoff_s(n_failures)
            self._expected_at = clock() + wait_s + self._start_took_s
            self.n_restarts += 1
            self.set_state(EngineState.RESTARTING, f"{why}; starting again in {wait_s:g} s")
            await asyncio.sleep(wait_s)

    async def _spawn(self) -> None:
        how = self._how
        how.socket.unlink(missing_ok=True)  # vLLM leaves it behind, and cannot bind to it again
        if how.log.exists():
            how.log.replace(how.log.with_suffix(".previous.log"))
        seen = {"CUDA_VISIBLE_DEVICES": self.devices} if self.devices else {}
        with how.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(watchdog.__file__), *how.argv),
                stdin=PIPE,  # never written to: it closes when this process ends
                stdout=log,
                stderr=STDOUT,
                env={**os.environ, **how.environment, **seen},
                start_new_session=True,
            )
        self._lost, self._expected_id = "", None  # it begins with what its command says

    async def _until_ready(self) -> str | None:
        """Start the process; None when it is ready, else why not."""
        try:
            await self._spawn()
            async with asyncio.timeout(self._timing.start_timeout_s):
                return await self._until_exit_or(self._poll_until_ready())
        except _Unfit as error:
            return str(error)
        except TimeoutError:
            return f"the engine was not ready after {self._timing.start_timeout_s:g} s"
        except OSError as error:
            return f"the engine process could not be started ({error})"

    async def _check_answers(self) -> None:
        if self._how.examine is not None and (wrong := await self._how.examine(self)):
            raise _Unfit(f"it does not answer as published ({'; '.join(wrong)})")

    async def _poll_until_ready(self) -> None:
        while not await self._becomes_ready():
            await asyncio.sleep(min(self._timing.health_interval_s, _LOOK_S))

    async def _until_exit_or(self, work: Coroutine[Any, Any, str | None]) -> str | None:
        """What `work` returns, or that the process ended before."""
        assert self._process is not None
        process = self._process
        working = asyncio.ensure_future(work)
        exiting = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({working, exiting}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            return "the engine process ended"
        finally:
            for task in (working, exiting):
                task.cancel()
            await asyncio.gather(working, exiting, return_exceptions=True)

    async def _kill(self) -> None:
        """SIGKILL the group; it may still have members when its leader has ended."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._process = None
        self._how.socket.unlink(missing_ok=True)

    async def _let_go(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()  # the watchdog passes it on
            with suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_GRACE_S):
                    await self._process.wait()
        await self._kill()

    def log_tail(self, n_lines: int = _TAIL_LINES) -> str:
        """The last lines that the engine wrote."""
        try:
            with self._how.log.open("rb") as log:
                log.seek(max(0, self._how.log.stat().st_size - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-n_lines:])
