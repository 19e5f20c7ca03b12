"""Uploaded files: one per content, for a time after their last use, within a quota of bytes.

A file is `media-<first 32 hex digits of its SHA-256>` in a private folder and nothing else is kept
of it: its times are the file's own (modified: created; accessed: used), what it shows is looked at
again. A file appears by a rename, so a crash leaves only `.part-…` files, which the next start
removes. Reading holds the file open: evicting or deleting it meanwhile takes only its name, the
request in flight reads on. What is read is compared with its id, so a torn file is none.

One server per folder. Knows: files, time, sizes. Does not know: what they hold.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from molmo_core.errors import InvalidMedia, MediaNotFound
from molmo_server.media.look import digest
from molmo_server.settings import MolmoSettings

_ID = re.compile(r"media-[0-9a-f]{32}")
_PART = ".part-"
_SWEEP_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Stored:
    id: str
    n_bytes: int
    created_at_s: float
    used_at_s: float
    expires_at_s: float
    """Times are those of the wall clock, since 1970."""


class Spool:
    """Use between `start` and `close`, inside one event loop."""

    def __init__(self, settings: MolmoSettings, *, clock: Callable[[], float] = time.time) -> None:
        self._dir = settings.media_dir
        self._quota_bytes = settings.media_quota_bytes
        self._ttl_s = settings.media_ttl_s
        self._clock = clock
        self._folder: Path | None = None
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        """By id, the least recently used first."""
        self._timer: asyncio.TimerHandle | None = None
        self.n_bytes = 0

    def start(self) -> None:
        """Take over what an earlier run left in `media_dir`."""
        if self._dir is None:
            self._folder = Path(tempfile.mkdtemp(prefix="molmo-media-"))
        else:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = self._dir
            self._adopt(self._dir)
        self._sweep()

    def close(self) -> None:
        """Removes the folder when it is a temporary one."""
        if self._timer is not None:
            self._timer.cancel()
        if self._dir is None and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def put(self, sha256: str, data: bytes) -> Stored:
        """Store a file under its digest, or renew it; raises InvalidMedia above the quota."""
        media_id = f"media-{sha256[:32]}"
        with suppress(MediaNotFound):
            self.open(media_id).close()
            return self.find(media_id)
        if len(data) > self._quota_bytes:
            raise InvalidMedia(
                f"the file has {len(data):,} bytes, this server stores {self._quota_bytes:,} in "
                "all; send it in the request, as a data URL"
            )
        part = self._path(f"{_PART}{uuid.uuid4().hex}")
        try:
            with open(part, "xb", opener=_private) as file:
                await asyncio.to_thread(file.write, data)
            self._make_room(len(data))
            part.rename(self._path(media_id))
        finally:
            part.unlink(missing_ok=True)
        self._forget(media_id)  # a twin may have come while this one was written
        now_s = self._clock()
        return self._note(media_id, len(data), created_at_s=now_s, used_at_s=now_s)

    async def read(self, media_id: str) -> bytes:
        """The file's bytes, and renew it; raises MediaNotFound."""
        with self.open(media_id) as file:
            data = await asyncio.to_thread(file.read)
        if not (await asyncio.to_thread(digest, data)).startswith(media_id.removeprefix("media-")):
            self._remove(media_id)
            raise self._not_found(media_id)
        return data

    def open(self, media_id: str) -> BinaryIO:
        """As `read`, not yet read; whatever happens to the file, this one stays whole."""
        self.find(media_id)
        try:
            file = self._path(media_id).open("rb")
        except OSError as error:
            self._forget(media_id)
            raise self._not_found(media_id) from error
        self._touch(media_id, file.fileno())
        return file

    def find(self, media_id: str) -> Stored:
        """Raises MediaNotFound."""
        self._drop_expired()
        if media_id not in self._stored:
            raise self._not_found(media_id)
        return self._stored[media_id]

    def delete(self, media_id: str) -> None:
        """Raises MediaNotFound."""
        self.find(media_id)
        self._remove(media_id)

    def _path(self, name: str) -> Path:
        """`name` is an id of the index or our own: never what a caller wrote."""
        assert self._folder is not None, "start the spool first"
        return self._folder / name

    def _adopt(self, folder: Path) -> None:
        found = []
        for path in folder.iterdir():
            facts = path.lstat()
            if path.name.startswith(_PART):
                path.unlink()
            elif _ID.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                found.append((facts.st_atime, facts.st_mtime, path.name, facts.st_size))
        for used_at_s, created_at_s, name, n_bytes in sorted(found):
            self._note(name, n_bytes, created_at_s=created_at_s, used_at_s=used_at_s)
        self._make_room(0)

    def _note(
        self, media_id: str, n_bytes: int, *, created_at_s: float, used_at_s: float
    ) -> Stored:
        stored = Stored(
            id=media_id,
            n_bytes=n_bytes,
            created_at_s=created_at_s,
            used_at_s=used_at_s,
            expires_at_s=used_at_s + self._ttl_s,
        )
        self._stored[media_id] = stored
        self.n_bytes += n_bytes
        os.utime(self._path(media_id), (used_at_s, created_at_s))
        return stored

    def _touch(self, media_id: str, descriptor: int) -> None:
        now_s = self._clock()
        stored = replace(self._stored[media_id], used_at_s=now_s, expires_at_s=now_s + self._ttl_s)
        self._stored[media_id] = stored
        self._stored.move_to_end(media_id)
        os.utime(descriptor, (now_s, stored.created_at_s))

    def _sweep(self) -> None:
        """Now and then, so that files go at their time also when nobody asks."""
        self._drop_expired()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(_SWEEP_EVERY_S, self._ttl_s), self._sweep)

    def _drop_expired(self) -> None:
        now_s = self._clock()
        while self._stored and (first := next(iter(self._stored.values()))).expires_at_s <= now_s:
            self._remove(first.id)

    def _make_room(self, n_bytes: int) -> None:
        while self._stored and self.n_bytes + n_bytes > self._quota_bytes:
            self._remove(next(iter(self._stored)))

    def _remove(self, media_id: str) -> None:
        self._path(media_id).unlink(missing_ok=True)
        self._forget(media_id)

    def _forget(self, media_id: str) -> None:
        if (stored := self._stored.pop(media_id, None)) is not None:
            self.n_bytes -= stored.n_bytes

    def _not_found(self, media_id: str) -> MediaNotFound:
        return MediaNotFound(
            f"there is no uploaded file {media_id[:60]!r}: it was not uploaded here, was removed, "
            f"or was not used for {self._ttl_s:g} s; upload it with POST /v1/media and use the id "
            "of the answer"
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
