"""A JSONL file as records: indexed by byte offsets, each line read and parsed when it is asked for.

Knows: lines, JSON, where in the file something stands. Does not know: fields of a row.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import DataError, InvalidExample

MAX_LINE_BYTES = 64 << 20
"""Of one row; pictures are files beside it."""
_CHUNK_BYTES = 8 << 20
_LONGEST_BLANK_BYTES = 32
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OTHER_BEGINNINGS = {
    codecs.BOM_UTF16_LE: "UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "compressed: unpack it with gunzip, lines of it are read in any order",
    b"PAR1": "Parquet: give it a name that ends with .parquet",
}


class JsonlRecords:
    """One record a line; blank lines and a byte order mark are passed over."""

    def __init__(self, path: Path) -> None:
        """Reads the file once for its lines. Raises DataError for what is no JSONL file."""
        self.path = path
        try:
            self._n_bytes = path.stat().st_size
            self._begins, self._ends, self._lines = _index(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int, field: str | None = None) -> str:
        """The file and line of a record, with the column of a field of it."""
        place = f"{self.path.name}:{self._lines[index]}"
        if field is None:
            return place
        column = self._read(index).find(json.dumps(field).encode())
        return place if column < 0 else f"{place}:{column + 1}"

    def record(self, index: int) -> Any:
        """Whatever the line says. Raises InvalidExample when it is no JSON."""
        n_bytes = int(self._ends[index] - self._begins[index])
        if n_bytes > MAX_LINE_BYTES:
            raise InvalidExample(
                f"{self.where(index)}: a line of {n_bytes:,} bytes, at most {MAX_LINE_BYTES:,} are "
                "read: keep pictures and videos in files of their own"
            )
        content = self._read(index)
        try:
            record = json.loads(content.decode("utf-8"))
            if _SURROGATE.search(content):
                json.dumps(record, ensure_ascii=False).encode()
            return record
        except UnicodeEncodeError as error:
            raise InvalidExample(
                f"{self.where(index)}: an escape \\ud8… of a text is half a character: write both "
                "halves"
            ) from error
        except UnicodeDecodeError as error:
            raise InvalidExample(
                f"{self.where(index)}:{error.start + 1}: the line is not UTF-8 "
                f"(byte 0x{content[error.start]:02x}): save the file as UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            raise InvalidExample(
                f"{self.where(index)}:{error.colno}: the line is no JSON ({error.msg}): "
                "write one object a line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidExample(
                f"{self.where(index)}: the line cannot be read ({error}): write one object a line"
            ) from error

    def _read(self, index: int) -> bytes:
        begin = int(self._begins[index])
        with self.path.open("rb") as file:  # opened anew: workers share nothing, files may be many
            if file.seek(0, 2) != self._n_bytes:
                raise DataError(
                    f"{self.path} has changed since it was opened: leave it as it is while it is "
                    "read, or begin anew"
                )
            file.seek(begin)
            return file.read(int(self._ends[index]) - begin)


Offsets = NDArray[np.int64]


def _index(path: Path) -> tuple[Offsets, Offsets, Offsets]:
    """Where each record begins and ends, and the number of its line, from 1."""
    with path.open("rb") as file:
        head = file.read(_LONGEST_BLANK_BYTES)
        _refuse_other_kinds(path, head)
        first = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(0)
        newlines, n_read = [], 0
        while chunk := file.read(_CHUNK_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + n_read)
            n_read += len(chunk)
        ends = np.concatenate([*newlines, [n_read]]).astype(np.int64)
        begins = np.concatenate([[first], ends[:-1] + 1])
        is_kept = ends - begins > _LONGEST_BLANK_BYTES
        for line in np.flatnonzero(~is_kept):
            file.seek(int(begins[line]))
            is_kept[line] = bool(file.read(int(ends[line] - begins[line])).strip())
    return begins[is_kept], ends[is_kept], np.flatnonzero(is_kept) + 1


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    for beginning, what in _OTHER_BEGINNINGS.items():
        if head.startswith(beginning):
            raise DataError(f"{path} is {what}")
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise DataError(f"{path} is a list in JSON: write its items one a line, as JSONL")
