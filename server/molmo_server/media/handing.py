"""Checked files on their way to engines of our own: by name instead of inside the request.

A file is written into a private folder that the engine may read, under a new name for every
request that is asked about it, and removed when that one is over: nothing else knows the name, so
nobody can delete or replace it meanwhile. What is written are the bytes that were looked at.

Knows: files, what may name them. Does not know: engines, formats.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """The bytes that were looked at."""

    data: bytes = field(repr=False)
    mime: str
    encoded: str = field(default="", repr=False)
    """The same in base64, where they came so."""

    def data_url(self) -> str:
        encoded = self.encoded or base64.b64encode(self.data).decode()
        return f"data:{self.mime};base64,{encoded}"


_Key = tuple[Path, int]


class HandedFiles:
    """The URLs of one request's files, for whichever engine is asked; `clear` when it is over."""

    def __init__(self) -> None:
        self._written: dict[_Key, Path] = {}

    async def url(self, file: MediaFile, folder: Path | None) -> str:
        """A name in `folder`, or, without one that can be written to, the whole file."""
        if folder is None:
            return await asyncio.to_thread(file.data_url)
        key = (folder, id(file))  # the request holds the file as long as this object
        if key not in self._written:
            path = folder / uuid.uuid4().hex
            self._written[key] = path
            try:
                await asyncio.to_thread(self._write, key, path, file.data)
            except OSError as error:
                logger.warning("a file is sent inside the request, the folder is full: %s", error)
                self._remove(key)
                return await asyncio.to_thread(file.data_url)
        return self._written[key].as_uri()

    def clear(self) -> None:
        for key in list(self._written):
            self._remove(key)

    def _remove(self, key: _Key) -> None:
        self._written.pop(key).unlink(missing_ok=True)

    def _write(self, key: _Key, path: Path, data: bytes) -> None:
        with open(path, "xb", opener=_private) as file:
            file.write(data)
        if self._written.get(key) != path:  # the request was over before its thread was done
            path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
