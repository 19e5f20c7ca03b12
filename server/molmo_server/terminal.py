"""What the person who started the server is told while the engine starts.

Progress goes to standard error: one line that is written anew on a terminal, a line now and then
elsewhere. When the engine is ready, standard output gets the address and a command to try.

Knows: wording, what the engine's log looks like. Does not know: how anything is started.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path

from molmo_server.engine_pool import EnginePool, SupervisedEngine

_LOOK_S = 0.2
_LINE_EVERY_S = 5.0
_WIDTH = 100
_CLIENT_DEFAULT = "http://127.0.0.1:8000"
_LOG_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:.]+ )?(?:\[[^\]]*\] )?")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f\x7f]")


def note(line: str) -> None:
    sys.stderr.write(f"{_CLEAR if sys.stderr.isatty() else ''}{line}\n")
    sys.stderr.flush()


async def tell(engines: EnginePool, address: str, checkpoint_id: str, log_dir: Path) -> bool:
    """Progress while the engine starts; True when it is ready, False when it was given up."""
    began = told_at = time.monotonic()
    note(f"molmo: {checkpoint_id} at {address}; the engine is starting, its log is in {log_dir}")
    is_terminal = sys.stderr.isatty()
    while not engines.is_ready:
        if engines.has_failed:
            note(f"molmo: the engine could not be started: {_why(engines)}")
            return False
        await asyncio.sleep(_LOOK_S)
        now = time.monotonic()
        line = f"molmo: {now - began:4.0f} s  {_doing(engines)}"[:_WIDTH]
        if is_terminal:
            sys.stderr.write(_CLEAR + line)
            sys.stderr.flush()
        elif now - told_at >= _LINE_EVERY_S:
            told_at = now
            note(line)
    note(f"molmo: ready after {time.monotonic() - began:.0f} s")
    sys.stdout.write(f"Open {address}/docs or ask for points:\n  {_command_to_try(address)}\n")
    sys.stdout.flush()
    return True


_CLEAR = "\r\x1b[K"


def _doing(engines: EnginePool) -> str:
    """The engine's last words while it starts, else why it does not."""
    engine = engines.engines[0]
    if isinstance(engine, SupervisedEngine) and engine.pid is not None:
        last = _LOG_PREFIX.sub("", _ESCAPES.sub("", engine.log_tail(1)))
        return last or engine.reason
    return engine.reason


def _why(engines: EnginePool) -> str:
    engine = engines.engines[0]
    tail = engine.log_tail() if isinstance(engine, SupervisedEngine) else ""
    return f"{engine.reason}\n{tail}".rstrip()


def _command_to_try(address: str) -> str:
    """A line that works where the server was started, also without an activated environment."""
    own = Path(sys.executable).with_name("molmo")
    found = shutil.which("molmo")
    is_on_path = found is not None and Path(found).resolve() == own.resolve()
    picture = str(files("molmo_client") / "examples" / "shapes.png")
    words = ["molmo" if is_on_path else _from_here(own), "point", _from_here(Path(picture))]
    server = "" if address == _CLIENT_DEFAULT else f" --server {address}"
    return f'{shlex.join(words)} "the red circle"{server}'


def _from_here(path: Path) -> str:
    """Relative when that is shorter and stays below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
