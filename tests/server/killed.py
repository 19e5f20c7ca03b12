"""Servers that are killed: a process with all imports done forks one after the other.

Run as `python -m tests.server.killed CHECKPOINT ENGINE_SOCKET BATCH_DIR`. Each line on standard
input is an `Order` as JSON; the answers are the address, when the server listens, and the signal
that ended it.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Order:
    """When a server is to kill itself, as `kill -9` does: before or after it has done something
    for so many times; without a step it waits to be killed."""

    step: str = ""
    """`module:Class.method`"""
    nth: int = 1
    is_after: bool = True


class Servers:
    """Started one after the other by the process of this module."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._running: int | None = None

    def start(self, order: Order) -> tuple[str, int]:
        """(address, process id) of a server that listens."""
        self._send(asdict(order))
        told = self._told()
        self._running = int(told["pid"])
        return str(told["address"]), self._running

    def wait(self) -> int:
        """The signal that ended it."""
        number = int(self._told()["signal"])
        self._running = None
        return number

    def end(self) -> None:
        if self._running is not None:
            os.kill(self._running, signal.SIGKILL)
        self._process.kill()

    def _send(self, content: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(content) + "\n")
        self._process.stdin.flush()

    def _told(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def servers(checkpoint: Path, engine_socket: Path, batch_dir: Path) -> Iterator[Servers]:
    folders = [str(checkpoint), str(engine_socket), str(batch_dir)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server.killed", *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        started = Servers(process)
        try:
            yield started
        finally:
            started.end()


def _serve(order: Order, folders: list[str], listener: socket.socket) -> None:
    import uvicorn

    from molmo_server.app import create_app
    from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
    from molmo_server.settings import MolmoSettings
    from tests.support.gateway import FAST

    checkpoint, engine_socket, batch_dir = map(Path, folders)
    if order.step:
        _arm(order)

    async def serve() -> None:
        engine = RemoteEngine(
            name="engine-0", address=EngineAddress(socket=engine_socket), timing=FAST
        )
        settings = MolmoSettings(checkpoint=checkpoint, batch_dir=batch_dir, drain_s=0.5)
        config = uvicorn.Config(create_app(settings, EnginePool([engine])), log_config=None)
        await uvicorn.Server(config).serve(sockets=[listener])

    asyncio.run(serve())


def _arm(order: Order) -> None:
    module_name, _, path = order.step.partition(":")
    class_name, _, name = path.partition(".")
    owner = getattr(importlib.import_module(module_name), class_name)
    done, calls = getattr(owner, name), itertools.count(1)

    def deadly(*given: Any, **named: Any) -> Any:
        is_it = next(calls) == order.nth
        if is_it and not order.is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = done(*given, **named)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def _main(folders: list[str]) -> None:
    import molmo_server.app  # noqa: F401  # once, before the first fork
    import tests.support.gateway  # noqa: F401

    def tell(**content: Any) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    for text in sys.stdin:
        order = Order(**json.loads(text))
        listener = socket.create_server(("127.0.0.1", 0))
        pid = os.fork()
        if pid == 0:
            _serve(order, folders, listener)
            os._exit(0)
        tell(address=f"http://127.0.0.1:{listener.getsockname()[1]}", pid=pid)
        listener.close()
        tell(signal=os.WTERMSIG(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    _main(sys.argv[1:])
