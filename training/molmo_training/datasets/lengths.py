"""Lengths that only reading a table tells, kept from one start of a run to the next.

In `~/.cache/molmo/lengths` a file for each table, named by all that its length follows from: size
and time of change of its files, what is read of them, and the code in this folder. So nothing that
is kept goes out of date, and processes that count at the same time write the same. Where nothing
can be written, tables are counted at every start.
Knows: files. Does not know: rows.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FOLDER = "~/.cache/molmo/lengths"


def key_of(read: Callable[..., Any], files: Sequence[Path]) -> str:
    """`read` has to be what other processes can be sent; `files` may be folders, too."""
    digest = hashlib.sha256(_code())
    digest.update(pickle.dumps(read))
    for path in files:
        digest.update(f"{path.absolute()} {_stamp(path)}\n".encode())
    return digest.hexdigest()


def kept_length(key: str) -> int | None:
    try:
        return int((Path(_FOLDER).expanduser() / key).read_text())
    except (OSError, RuntimeError, ValueError):
        return None


def keep_length(key: str, n_rows: int) -> None:
    """Whole or not at all."""
    try:
        folder = Path(_FOLDER).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{key}.{uuid.uuid4().hex}"
        try:
            partial.write_text(f"{n_rows}\n")
            partial.replace(folder / key)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        logger.info("a table will be counted again at the next start: %s", error)


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "gone"  # who reads it says so
    return f"{found.st_size} {found.st_mtime_ns}"


@cache
def _code() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
