"""The folder of files and batches: an SQLite database, and files beside it by their ids.

What is written to the database is written whole, on the disk when the call returns, or not at all.
A file is complete before the database names it, and the database has forgotten it before it is
removed: what a crash leaves behind has no row, and the next start removes it. A lock that ends with
the process keeps a second server out.

Knows: the disk, tables. Does not know: what rows mean (`files`, `jobs`), tenants.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from molmo_core.errors import BatchStoreError

_DATABASE, _LOCK, _PART = "batches.db", "lock", ".part-"
_FILE = re.compile(r"file-[0-9a-f]{24}")
_FORMAT = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL
);
CREATE INDEX files_of ON files (tenant, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    key_prefix TEXT NOT NULL, input_file_id TEXT NOT NULL, output_ttl_s INTEGER NOT NULL,
    status TEXT NOT NULL, ended_at INTEGER, told TEXT NOT NULL
);
CREATE INDEX batches_of ON batches (tenant, seq);
CREATE TABLE results (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, is_good INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
);
CREATE INDEX results_counted ON results (batch_id, is_good);
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


class BatchFolder:
    """Open until `close`, for use by any thread. All methods raise BatchStoreError."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None: a private temporary one, removed at `close`."""
        self._is_temporary = folder is None
        self._guard = threading.Lock()
        try:
            self.path = folder or Path(tempfile.mkdtemp(prefix="molmo-batches-"))
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = (self.path / _LOCK).open("wb")
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._lock()
            (self.path / _DATABASE).touch(mode=0o600)
            self._db = sqlite3.connect(
                self.path / _DATABASE, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except (BatchStoreError, OSError, sqlite3.Error) as error:
            self._lock_file.close()
            raise self._unusable(error) from error

    def close(self) -> None:
        with self._guard:
            self._db.close()
        if self._is_temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock_file.close()

    @contextmanager
    def using(self, *, writes: bool = False) -> Iterator[sqlite3.Connection]:
        """One at a time; what is written is written whole or not at all."""
        with self._guard:
            try:
                with self._db:
                    if writes:
                        self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    # --- files ----------------------------------------------------------------------------------

    def path_of(self, file_id: str) -> Path:
        """`file_id` is one that the database knows: never what a caller wrote."""
        return self.path / file_id

    @contextmanager
    def part(self) -> Iterator[BinaryIO]:
        """A file to write, gone after the block unless `keep` gave it a name."""
        path = self.path / f"{_PART}{uuid.uuid4().hex}"
        with self.errors():  # also while it is written, and closed
            try:
                with open(path, "xb", opener=_private) as file:
                    yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, part: BinaryIO, file_id: str) -> Path:
        """Give a part its name; it is on the disk then."""
        with self.errors():
            part.flush()
            os.fsync(part.fileno())
            path = self.path_of(file_id)
            Path(part.name).rename(path)
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return path

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Trouble with the disk becomes BatchStoreError."""
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    # --- opening --------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchStoreError("another server uses it") from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _FORMAT):
            raise BatchStoreError(f"it has format {version}, this version reads {_FORMAT}")
        if version != _FORMAT:
            self._db.executescript(_SCHEMA)
        known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
        for path in self.path.iterdir():
            is_ours = path.name.startswith(_PART) or _FILE.fullmatch(path.name)
            if is_ours and path.name not in known:
                path.unlink()

    def _unusable(self, error: Exception) -> BatchStoreError:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        else:
            told = error.strerror if isinstance(error, OSError) else str(error)
            reason = told or type(error).__name__
        return BatchStoreError(
            f"files and batches cannot be kept now: {reason}; nothing that was kept is lost, send "
            "it again when whoever runs this server has made room in its MOLMO_BATCH_DIR or named "
            "another folder"
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
