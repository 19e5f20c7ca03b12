"""The scripted engine as a process of its own, under the real supervisor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from molmo_server.engine_pool import (
    EngineProcess,
    EngineTiming,
    RestartPolicy,
    SupervisedEngine,
)

FAST_TIMING = EngineTiming(
    health_interval_s=0.1, health_timeout_s=1, hang_grace_s=1, start_timeout_s=60
)
FAST_RESTARTS = RestartPolicy(first_backoff_s=0.05, longest_backoff_s=1, max_failed_starts=2)


def fake_command(socket: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "molmo_server.engine_pool.fake", "--uds", str(socket), *options]


def fake_process(folder: Path, *, timing: EngineTiming = FAST_TIMING) -> SupervisedEngine:
    """A supervised engine in `folder`; it fails to start while `folder/fail` exists."""
    socket = folder / "engine.sock"
    options = ["--child-pid-file", str(folder / "child"), "--fail-if", str(folder / "fail")]
    process = EngineProcess(
        argv=fake_command(socket, *options), socket=socket, log=folder / "engine.log"
    )
    return SupervisedEngine(
        name="engine-0",
        process=process,
        timing=timing,
        restarts=FAST_RESTARTS,
        warm_ups=(question("Hi"),),
    )


def question(text: str) -> bytes:
    """A body for the engine."""
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "molmo2", "messages": messages}).encode()


def child_pid(folder: Path) -> int:
    """Of the engine's own child, as vLLM has them."""
    return int((folder / "child").read_text())


def engine_pid(folder: Path) -> int:
    """Of the engine's first process."""
    return _field(child_pid(folder), "PPid")


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended; one that nobody waited for has ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _field(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
