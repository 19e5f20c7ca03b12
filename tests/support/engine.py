"""A real engine process for tests: vLLM's API server on a Unix socket, as users run it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from molmo_server.engine.launch import EngineSettings, engine_command

_START_LIMIT_S = 300


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
        """Ask greedily; raises with the engine's words when the answer is not a 200."""
        body = {"model": "molmo2", "messages": messages, "temperature": 0, **fields}
        response = self.client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:2000]}\n{self.log_tail()}")
        answer: dict[str, Any] = response.json()
        return answer

    def stop(self) -> None:
        """End the whole process group; what is left after a grace is killed."""
        self.client.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
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


@contextmanager
def engines_side_by_side(
    wanted: dict[str, tuple[Path, dict[str, str]]], folder: Path, **fields: Any
) -> Iterator[dict[str, RunningEngine]]:
    """Engines by name, each of a checkpoint and with added environment; started at once.

    Starting is mostly importing on one core, so side by side takes little longer than one.
    """
    engines: dict[str, RunningEngine] = {}
    defaults = {"dtype": "float32", "n_threads": 1, "max_num_seqs": 8}
    try:
        for name, (checkpoint, environment) in wanted.items():
            settings = EngineSettings(
                checkpoint=checkpoint, socket=folder / f"{name}.sock", **{**defaults, **fields}
            )
            engines[name] = start_engine(settings, folder / f"{name}.log", environment)
        for engine in engines.values():
            engine.wait_until_ready()
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


@contextmanager
def running_engine(
    checkpoint: Path, folder: Path, *, environment: dict[str, str] | None = None, **fields: Any
) -> Iterator[RunningEngine]:
    """One engine that answers; its socket and log lie in `folder`."""
    wanted = {"engine": (checkpoint, environment or {})}
    with engines_side_by_side(wanted, folder, **fields) as engines:
        yield engines["engine"]
