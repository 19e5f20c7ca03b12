"""Programs that are measured, each as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

Row = tuple[str, float, str]
"""What was measured, the figure, its unit and whatever else is to be said of it."""

MOLMO = Path(sys.executable).with_name("molmo")


@contextmanager
def running(argv: list[str]) -> Iterator[psutil.Process]:
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "MOLMO_LOG_LEVEL": "warning"}
    with subprocess.Popen(argv, stdout=quiet, stderr=quiet, env=environment) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def wait_for(port: int) -> None:
    """Until something listens there, for a minute."""
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
