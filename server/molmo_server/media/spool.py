"""Uploaded files: one per content, for a time after their last use, within each owner's quota.

A file is `media-<first 32 hex digits of its SHA-256>` in a private folder, where keys are in use
with its owner's mark behind it (`.` and 16 hex digits): each tenant has their own, and an id of
another's is unknown. Nothing else is kept of a file: its times are the file's own (modified:
created; accessed: used), what it shows is looked at again. A file appears by a rename, so a crash
leaves only `.part-…` files, which the next start removes. Reading holds the file open: evicting or
deleting it meanwhile takes only its name, the request in flight reads on. What is read is compared
with its id, so a torn file is none.

One server per folder. Knows: files, time, sizes. Does not know: what they hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from molmo_core.errors import Busy, InvalidMedia, MediaNotFound
from molmo_server.media.look import digest
from molmo_server.settings import MolmoSettings

_NAME = re.compile(r"media-[0-9a-f]{32}(\.[0-9a-f]{16})?")
_PART = ".part-"
_SWEEP_EVERY_S = 60.0
_DISK_RETRY_S = 60.0


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
        """By name, the least recently used first."""
        self._timer: asyncio.TimerHandle | None = None
        self._n_bytes: Counter[str] = Counter()
        """By the owner's mark."""

    @property
    def n_bytes(self) -> int:
        return self._n_bytes.total()

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

    async def put(self, sha256: str, data: bytes, owner: str = "") -> Stored:
        """Store a file under its digest, or renew it.

        Raises InvalidMedia for a file above the quota, Busy when the disk does not take it.
        """
        media_id = f"media-{sha256[:32]}"
        with suppress(MediaNotFound):
            return self._renewed(media_id, owner)
        name = _name(media_id, owner)
        if len(data) > self._quota_bytes:
            raise InvalidMedia(
                f"the file has {len(data):,} bytes, this server keeps {self._quota_bytes:,} of "
                "one caller in all; send it in the request, as a data URL"
            )
        part = self._path(f"{_PART}{uuid.uuid4().hex}")
        try:
            with open(part, "xb", opener=_private) as file:
                await asyncio.to_thread(file.write, data)
            with suppress(MediaNotFound):  # a twin may have come while this one was written
                return self._renewed(media_id, owner)
            self._make_room(len(data), _mark(name))
            part.rename(self._path(name))
        except OSError as error:
            raise Busy(
                f"this server's disk does not take the file ({error.strerror}); send it in the "
                "request, as a data URL, or upload it later",
                retry_after_s=_DISK_RETRY_S,
            ) from error
        finally:
            part.unlink(missing_ok=True)
        now_s = self._clock()
        return self._note(name, len(data), created_at_s=now_s, used_at_s=now_s)

    def _renewed(self, media_id: str, owner: str) -> Stored:
        self.open(media_id, owner).close()
        return self.find(media_id, owner)

    async def read(self, media_id: str, owner: str = "") -> tuple[bytes, str]:
        """The file's bytes and their SHA-256, and renew it; raises MediaNotFound."""
        with self.open(media_id, owner) as file:
            data = await asyncio.to_thread(file.read)
        sha256 = await asyncio.to_thread(digest, data)
        if not sha256.startswith(media_id.removeprefix("media-")):
            self._remove(_name(media_id, owner))
            raise self._not_found(media_id)
        return data, sha256

    def open(self, media_id: str, owner: str = "") -> BinaryIO:
        """As `read`, not yet read; whatever happens to the file, this one stays whole."""
        self.find(media_id, owner)
        name = _name(media_id, owner)
        try:
            file = self._path(name).open("rb")
        except OSError as error:
            self._forget(name)
            raise self._not_found(media_id) from error
        self._touch(name, file.fileno())
        return file

    def find(self, media_id: str, owner: str = "") -> Stored:
        """Raises MediaNotFound, also for a file of another owner."""
        self._drop_expired()
        stored = self._stored.get(_name(media_id, owner))
        if stored is None or stored.id != media_id:
            raise self._not_found(media_id)
        return stored

    def delete(self, media_id: str, owner: str = "") -> None:
        """Raises MediaNotFound."""
        self.find(media_id, owner)
        self._remove(_name(media_id, owner))

    def _path(self, name: str) -> Path:
        """`name` is one of the index or our own: never what a caller wrote."""
        assert self._folder is not None, "start the spool first"
        return self._folder / name

    def _adopt(self, folder: Path) -> None:
        found = []
        for path in folder.iterdir():
            facts = path.lstat()
            if path.name.startswith(_PART):
                path.unlink()
            elif _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                found.append((facts.st_atime, facts.st_mtime, path.name, facts.st_size))
        for used_at_s, created_at_s, name, n_bytes in sorted(found):
            self._note(name, n_bytes, created_at_s=created_at_s, used_at_s=used_at_s)
        for mark in list(self._n_bytes):
            self._make_room(0, mark)

    def _note(self, name: str, n_bytes: int, *, created_at_s: float, used_at_s: float) -> Stored:
        stored = Stored(
            id=name.partition(".")[0],
            n_bytes=n_bytes,
            created_at_s=created_at_s,
            used_at_s=used_at_s,
            expires_at_s=used_at_s + self._ttl_s,
        )
        self._stored[name] = stored
        self._n_bytes[_mark(name)] += n_bytes
        os.utime(self._path(name), (used_at_s, created_at_s))
        return stored

    def _touch(self, name: str, descriptor: int) -> None:
        now_s = self._clock()
        stored = replace(self._stored[name], used_at_s=now_s, expires_at_s=now_s + self._ttl_s)
        self._stored[name] = stored
        self._stored.move_to_end(name)
        os.utime(descriptor, (now_s, stored.created_at_s))

    def _sweep(self) -> None:
        """Now and then, so that files go at their time also when nobody asks."""
        self._drop_expired()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(_SWEEP_EVERY_S, self._ttl_s), self._sweep)

    def _drop_expired(self) -> None:
        now_s = self._clock()
        while self._stored:
            name, first = next(iter(self._stored.items()))
            if first.expires_at_s > now_s:
                break
            self._remove(name)

    def _make_room(self, n_bytes: int, mark: str) -> None:
        names = [name for name in self._stored if _mark(name) == mark]
        for name in names:
            if self._n_bytes[mark] + n_bytes <= self._quota_bytes:
                break
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if (stored := self._stored.pop(name, None)) is not None:
            self._n_bytes[_mark(name)] -= stored.n_bytes

    def _not_found(self, media_id: str) -> MediaNotFound:
        return MediaNotFound(
            f"there is no uploaded file {media_id[:60]!r}: it was not uploaded here, was removed, "
            f"or was not used for {self._ttl_s:g} s; upload it with POST /v1/media and use the id "
            "of the answer"
        )


def _name(media_id: str, owner: str) -> str:
    mark = hashlib.sha256(owner.encode()).hexdigest()[:16]
    return f"{media_id}.{mark}" if owner else media_id


def _mark(name: str) -> str:
    return name.partition(".")[2]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
