"""Files by tenant: who may see which, how much and how long.

A file belongs to the tenant that uploaded it, or whose batch wrote it; for all others it is not
there. The files of answers count towards the tenant's quota and are never refused.

Knows: files as OpenAI tells of them, quota, time. Does not know: what is in them, HTTP.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from molmo_core.api_batches import ENDED, File, FileList, FilePurpose
from molmo_core.errors import InvalidRequest, NotFound
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.pages import Order, page_of, rows_of_page

_COLUMNS = "id, filename, purpose, bytes, created_at, expires_at"


class FileStore:
    """For use by any thread. All methods raise BatchStoreError as well."""

    def __init__(
        self,
        folder: BatchFolder,
        *,
        quota_bytes: int,
        ttl_s: float,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`quota_bytes` of one tenant."""
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._ttl_s = ttl_s
        self._now_s = now_s

    def check_room(self, tenant: str) -> int:
        """Bytes that are left of the quota; raises InvalidRequest when there are none."""
        with self._folder.using() as db:
            left = self._quota_bytes - _n_bytes(db, tenant)
        if left <= 0:
            raise self._over_quota()
        return left

    def add(
        self,
        part: BinaryIO,
        *,
        tenant: str,
        filename: str,
        ttl_s: float | None = None,
    ) -> File:
        """Take over what was uploaded; raises InvalidRequest above the quota."""
        file = self.new(part, filename=filename, purpose="batch", ttl_s=ttl_s)
        path = self._folder.keep(part, file.id)
        try:
            with self._folder.using(writes=True) as db:
                if _n_bytes(db, tenant) + file.bytes > self._quota_bytes:
                    raise self._over_quota()
                insert_file(db, tenant, file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return file

    def new(
        self,
        part: BinaryIO,
        *,
        filename: str,
        purpose: FilePurpose,
        ttl_s: float | None = None,
    ) -> File:
        """A file with an id, which the database does not know yet."""
        now_s = int(self._now_s())
        return File(
            id=f"file-{secrets.token_hex(12)}",
            bytes=part.tell(),
            created_at=now_s,
            expires_at=now_s + int(ttl_s or self._ttl_s),
            filename=filename,
            purpose=purpose,
        )

    def get(self, tenant: str, file_id: str) -> File:
        """Raises NotFound."""
        with self._folder.using() as db:
            return self._get(db, tenant, file_id)

    def path(self, tenant: str, file_id: str) -> Path:
        """Of the content; raises NotFound."""
        return self._folder.path_of(self.get(tenant, file_id).id)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> FileList:
        """Those after the one named `after`; raises NotFound for one that is not there."""
        query = f"SELECT {_COLUMNS} FROM files WHERE tenant = ? AND expires_at > ?"
        values = [tenant, self._now_s()]
        if purpose is not None:
            query, values = f"{query} AND purpose = ?", [*values, purpose]
        with self._folder.using() as db:
            if after is not None:
                self._get(db, tenant, after)
            rows, has_more = rows_of_page(
                db, query, values, table="files", limit=limit, after=after, order=order
            )
        return page_of(FileList, [_file(row) for row in rows], has_more=has_more)

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFound, InvalidRequest while a batch reads it."""
        with self._folder.using(writes=True) as db:
            self._get(db, tenant, file_id)
            reader = db.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND status NOT IN {ENDED}",
                (file_id,),
            ).fetchone()
            if reader is not None:
                raise InvalidRequest(
                    f"the batch {reader[0]} reads this file; cancel it first, or wait for its end"
                )
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        with self._folder.errors():
            self._folder.path_of(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what is over its time and read by no batch."""
        with self._folder.using(writes=True) as db:
            rows = db.execute(
                "DELETE FROM files WHERE expires_at <= ? AND id NOT IN "
                f"(SELECT input_file_id FROM batches WHERE status NOT IN {ENDED}) RETURNING id",
                (self._now_s(),),
            ).fetchall()
        with self._folder.errors():
            for (file_id,) in rows:
                self._folder.path_of(file_id).unlink(missing_ok=True)

    def _get(self, db: sqlite3.Connection, tenant: str, file_id: str) -> File:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM files WHERE id = ? AND tenant = ? AND expires_at > ?",
            (file_id, tenant, self._now_s()),
        ).fetchone()
        if row is None:
            raise NotFound(
                f"there is no file {file_id[:60]!r}: it was not uploaded here with this key's "
                "name, was deleted, or its time is over; GET /v1/files lists what there is"
            )
        return _file(row)

    def _over_quota(self) -> InvalidRequest:
        return InvalidRequest(
            f"with this file there would be more than the {self._quota_bytes:,} bytes that may be "
            "stored; delete files that are not needed: GET /v1/files, DELETE /v1/files/{id}"
        )


def insert_file(db: sqlite3.Connection, tenant: str, file: File) -> None:
    db.execute(
        f"INSERT INTO files (tenant, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            tenant,
            file.id,
            file.filename,
            file.purpose,
            file.bytes,
            file.created_at,
            file.expires_at,
        ),
    )


def _file(row: tuple[Any, ...]) -> File:
    return File(**dict(zip(_COLUMNS.split(", "), row, strict=True)))


def _n_bytes(db: sqlite3.Connection, tenant: str) -> int:
    [n_bytes] = db.execute(
        "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ?", (tenant,)
    ).fetchone()
    return int(n_bytes)
