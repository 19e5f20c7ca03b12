"""PostgreSQL and Redis as processes of their own, with nothing kept between runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.gateway import until

_POSTGRES_USER = "postgres"


@contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of a database on a Unix socket; its user has a password that stands in the URL."""
    [binaries, *_] = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    # Not below pytest's folders, which only their owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="molmo-pg-"))
    try:
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(folder, _POSTGRES_USER)
        data = folder / "data"
        _as_postgres(
            *(binaries / "initdb", "-D", data, "-A", "trust", "-U", "molmo", "-E", "UTF8"),
            *("--no-locale", "--no-sync"),
        )
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        control = (binaries / "pg_ctl", "-D", data, "-l", folder / "log", "-w")
        _as_postgres(*control, "-o", options, "start")
        try:
            yield f"postgresql://molmo:a%20secret@/postgres?host={folder}"
        finally:
            _as_postgres(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _as_postgres(*command: str | Path) -> None:
    prefix = ["runuser", "-u", _POSTGRES_USER, "--"] if os.geteuid() == 0 else []
    done = subprocess.run([*prefix, *map(str, command)], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, command


@contextmanager
def running_redis(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """On the Unix socket `folder`/redis.sock."""
    socket = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""]
    with subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL) as server:
        try:
            until(socket.exists)
            yield server
        finally:
            server.kill()
            server.wait()
            socket.unlink(missing_ok=True)
