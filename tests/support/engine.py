"""A real engine process for tests: vLLM's API server on a Unix socket, as users run it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from molmo_server.engine.launch import EngineSettings, engine_command

_START_LIMIT_S = 600
_DEFAULTS: dict[str, Any] = {"dtype": "float32", "n_threads": 1, "max_num_seqs": 8}


class EngineRefusal(RuntimeError):
    """The engine answered, but not with a 200."""


@dataclass
class RunningEngine:
    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def __post_init__(self) -> None:
        self.client = httpx2.Client(
            # The server closes idle connections; one that is used once cannot race with that.
            transport=httpx2.HTTPTransport(
                uds=str(self.socket), limits=httpx2.Limits(max_keepalive_connections=0)
            ),
            base_url="http://engine",
            timeout=300,
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._listens() and self.client.get("/health").status_code == 200:
                return
            try:
                self.process.wait(timeout=0.3)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the engine ended while starting:\n{self.log_tail()}")
        raise RuntimeError(f"the engine was not ready in {_START_LIMIT_S} s:\n{self.log_tail()}")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Ask greedily; raises EngineRefusal with the engine's words."""
        body = {"model": "molmo2", "messages": messages, "temperature": 0, **fields}
        response = self.client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise EngineRefusal(f"{response.status_code}: {response.text[:2000]}")
        answer: dict[str, Any] = response.json()
        return answer

    def signal_to_end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Wait for the end of the whole process group; what is left after a grace is killed."""
        self.client.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=40)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.unlink(missing_ok=True)  # vLLM leaves it, and cannot bind to it again


def start_engine(
    settings: EngineSettings, log: Path, environment: dict[str, str] | None = None
) -> RunningEngine:
    """Start without waiting, so that several can start side by side."""
    argv, added = engine_command(settings)
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **added, **(environment or {})},
            start_new_session=True,
        )
    return RunningEngine(process=process, socket=settings.socket, log=log)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An engine to start: of which checkpoint, with which settings and environment added."""

    checkpoint: Path
    fields: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def engines_side_by_side(
    wanted: dict[str, Wanted], folder: Path
) -> Iterator[dict[str, RunningEngine]]:
    """Engines by name, started at once; their sockets and logs lie in `folder`.

    Starting is mostly importing on one core, so side by side takes little longer than one.
    """
    engines: dict[str, RunningEngine] = {}
    try:
        for name, what in wanted.items():
            settings = EngineSettings(
                checkpoint=what.checkpoint,
                socket=folder / f"{name}.sock",
                **{**_DEFAULTS, **what.fields},
            )
            engines[name] = start_engine(settings, folder / f"{name}.log", what.environment)
        for engine in engines.values():
            engine.wait_until_ready()
        yield engines
    finally:
        for engine in engines.values():
            engine.signal_to_end()
        for engine in engines.values():
            engine.stop()


@contextmanager
def running_engine(wanted: Wanted, folder: Path) -> Iterator[RunningEngine]:
    """One engine that answers."""
    with engines_side_by_side({"engine": wanted}, folder) as engines:
        yield engines["engine"]
