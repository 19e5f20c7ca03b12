"""Batches by tenant, and the answers of their lines until the files of answers are written.

    validating → in_progress → finalizing → completed
               ↘ failed      ↘ expired, cancelling → cancelled

The answer of a line is kept once, whoever asks for how often. That a batch has ended and which
files have its answers is written in one piece.

Knows: states of batches and which may follow. Does not know: what runs lines (`runner`), HTTP.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from molmo_core.api_batches import (
    ENDED,
    Batch,
    BatchError,
    BatchErrors,
    BatchList,
    BatchRequest,
    BatchStatus,
    File,
    RequestCounts,
    window_s,
)
from molmo_core.errors import InvalidRequest, NotFound, RateLimited
from molmo_server.batches.files import insert_file
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.pages import page_of, rows_of_page
from molmo_server.tenancy.callers import Errand

_COLUMNS = "tenant, key_prefix, output_ttl_s, told"
_PAGE_LINES = 64
_MANY_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch as it is run."""

    errand: Errand
    output_ttl_s: int
    """0: as long as other files."""
    batch: Batch
    """Its `request_counts` may be old while it is in progress."""
    input_path: Path


class Result(NamedTuple):
    line: int
    is_good: bool
    text: bytes
    """A line of a file of answers, with its end."""


class JobStore:
    """For use by any thread. All methods raise BatchStoreError as well."""

    def __init__(
        self,
        folder: BatchFolder,
        *,
        max_unfinished: int,
        ttl_s: float,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`max_unfinished` batches of one tenant; for `ttl_s` a batch is kept after its end."""
        self._folder = folder
        self._max_unfinished = max_unfinished
        self._ttl_s = ttl_s
        self._now_s = now_s

    # --- for callers ----------------------------------------------------------------------------

    def create(self, errand: Errand, request: BatchRequest) -> Batch:
        """A batch that waits for its check.

        Raises NotFound, InvalidRequest for its file; RateLimited for too many that have not ended.
        """
        now_s = int(self._now_s())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            status="validating",
            created_at=now_s,
            expires_at=now_s + window_s(request.completion_window),
            metadata=request.metadata,
        )
        ttl = request.output_expires_after
        with self._folder.using(writes=True) as db:
            self._check_input(db, errand.tenant, request.input_file_id)
            [n_unfinished] = db.execute(
                f"SELECT count(*) FROM batches WHERE tenant = ? AND status NOT IN {ENDED}",
                (errand.tenant,),
            ).fetchone()
            if n_unfinished >= self._max_unfinished:
                raise RateLimited(
                    f"{n_unfinished} batches have not ended, which is all that are taken; wait "
                    "for one, or cancel it",
                    retry_after_s=_MANY_RETRY_S,
                )
            db.execute(
                f"INSERT INTO batches (id, input_file_id, status, {_COLUMNS}) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    batch.id,
                    batch.input_file_id,
                    batch.status,
                    errand.tenant,
                    errand.key_prefix,
                    ttl.seconds if ttl else 0,
                    batch.model_dump_json(),
                ),
            )
        return batch

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFound."""
        with self._folder.using() as db:
            return _counted(db, self._of(db, tenant, batch_id))

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> BatchList:
        """Newest first, those after the one named `after`; raises NotFound for an unknown one."""
        with self._folder.using() as db:
            if after is not None:
                self._of(db, tenant, after)
            query = "SELECT told FROM batches WHERE tenant = ?"
            rows, has_more = rows_of_page(
                db, query, [tenant], table="batches", limit=limit, after=after
            )
            batches = [_counted(db, Batch.model_validate_json(told)) for (told,) in rows]
        return page_of(BatchList, batches, has_more=has_more)

    def cancel(self, tenant: str, batch_id: str) -> Batch:
        """No line begins after it; raises NotFound, InvalidRequest for one that has ended."""
        with self._folder.using(writes=True) as db:
            batch = self._of(db, tenant, batch_id)
            if batch.has_ended:
                raise InvalidRequest(
                    f"the batch is {batch.status}; only one that has not ended can be cancelled"
                )
            if batch.status in ("validating", "in_progress"):
                batch = self._move(db, batch, "cancelling")
            return _counted(db, batch)

    # --- for the runner -------------------------------------------------------------------------

    def unfinished(self) -> list[str]:
        """Ids, oldest first."""
        with self._folder.using() as db:
            rows = db.execute(f"SELECT id FROM batches WHERE status NOT IN {ENDED} ORDER BY seq")
            return [batch_id for (batch_id,) in rows]

    def job(self, batch_id: str) -> Job:
        with self._folder.using() as db:
            tenant, key_prefix, output_ttl_s, told = db.execute(
                f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch_id,)
            ).fetchone()
        batch = Batch.model_validate_json(told)
        return Job(
            errand=Errand(tenant=tenant, key_prefix=key_prefix),
            output_ttl_s=output_ttl_s,
            batch=batch,
            input_path=self._folder.path_of(batch.input_file_id),
        )

    def checked(self, batch_id: str, n_lines: int, errors: list[BatchError]) -> None:
        """The file was looked at: its lines may run, unless there are errors."""
        with self._folder.using(writes=True) as db:
            batch = _known(db, batch_id)
            if batch.status != "validating":  # cancelled meanwhile
                return
            if errors:
                told = BatchErrors(data=errors)
                self._move(db, batch.model_copy(update={"errors": told}), "failed")
            else:
                counts = RequestCounts(total=n_lines)
                counted = batch.model_copy(update={"request_counts": counts})
                self._move(db, counted, "in_progress")

    def keep(self, batch_id: str, result: Result) -> bool:
        """Keep the answer of a line; False when there is one, or the batch has ended."""
        with self._folder.using(writes=True) as db:
            done = db.execute(
                "INSERT OR IGNORE INTO results (batch_id, line, is_good, text) "
                "SELECT ?, ?, ?, ? WHERE EXISTS "
                "(SELECT 1 FROM batches WHERE id = ? AND ended_at IS NULL)",
                (batch_id, *result, batch_id),
            )
            return done.rowcount == 1

    def answered(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have an answer."""
        with self._folder.using() as db:
            rows = db.execute("SELECT line FROM results WHERE batch_id = ?", (batch_id,))
            return {line for (line,) in rows}

    def results(self, batch_id: str) -> Iterator[Result]:
        """In order, a few at a time in memory."""
        last = 0
        while True:
            with self._folder.using() as db:
                rows = db.execute(
                    "SELECT line, is_good, text FROM results WHERE batch_id = ? AND line > ? "
                    "ORDER BY line LIMIT ?",
                    (batch_id, last, _PAGE_LINES),
                ).fetchall()
            if not rows:
                return
            yield from (Result(line, bool(is_good), text) for line, is_good, text in rows)
            last = rows[-1][0]

    def finalize(self, batch_id: str) -> None:
        """All lines are answered; unless it was cancelled meanwhile."""
        with self._folder.using(writes=True) as db:
            batch = _known(db, batch_id)
            if batch.status == "in_progress":
                self._move(db, batch, "finalizing")

    def end(
        self,
        job: Job,
        status: BatchStatus,
        counts: RequestCounts,
        *,
        output: File | None,
        errors: File | None,
    ) -> None:
        """The files of answers are there: the batch has ended, in one piece."""
        batch_id = job.batch.id
        with self._folder.using(writes=True) as db:
            for file in (output, errors):
                if file is not None:
                    insert_file(db, job.errand.tenant, file)
            ended = _known(db, batch_id).model_copy(
                update={
                    "output_file_id": output and output.id,
                    "error_file_id": errors and errors.id,
                    "request_counts": counts,
                }
            )
            self._move(db, ended, status)
            db.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))

    def sweep(self) -> None:
        """Forget batches that ended long ago."""
        with self._folder.using(writes=True) as db:
            db.execute("DELETE FROM batches WHERE ended_at <= ?", (self._now_s() - self._ttl_s,))

    # --- rows -----------------------------------------------------------------------------------

    def _check_input(self, db: sqlite3.Connection, tenant: str, file_id: str) -> None:
        row = db.execute(
            "SELECT purpose FROM files WHERE id = ? AND tenant = ? AND expires_at > ?",
            (file_id, tenant, self._now_s()),
        ).fetchone()
        if row is None:
            raise NotFound(
                f"there is no file {file_id[:60]!r}; upload the requests with POST /v1/files and "
                "purpose batch",
                param="input_file_id",
            )
        if row[0] != "batch":
            raise InvalidRequest(
                f"the file has the purpose {row[0]}; name one that was uploaded with purpose batch",
                param="input_file_id",
            )

    def _of(self, db: sqlite3.Connection, tenant: str, batch_id: str) -> Batch:
        row = db.execute(
            "SELECT told FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
        ).fetchone()
        if row is None:
            raise NotFound(
                f"there is no batch {batch_id[:60]!r} of this key's name; GET /v1/batches lists "
                "what there is"
            )
        return Batch.model_validate_json(row[0])

    def _move(self, db: sqlite3.Connection, batch: Batch, status: BatchStatus) -> Batch:
        now_s = int(self._now_s())
        moved = batch.model_copy(update={"status": status, f"{status}_at": now_s})
        db.execute(
            "UPDATE batches SET status = ?, ended_at = ?, told = ? WHERE id = ?",
            (status, now_s if moved.has_ended else None, moved.model_dump_json(), batch.id),
        )
        return moved


def _known(db: sqlite3.Connection, batch_id: str) -> Batch:
    [told] = db.execute("SELECT told FROM batches WHERE id = ?", (batch_id,)).fetchone()
    return Batch.model_validate_json(told)


def _counted(db: sqlite3.Connection, batch: Batch) -> Batch:
    """With the lines that are answered by now."""
    if batch.has_ended:
        return batch
    n_lines, n_good = db.execute(
        "SELECT count(*), coalesce(sum(is_good), 0) FROM results WHERE batch_id = ?", (batch.id,)
    ).fetchone()
    counts = RequestCounts(
        total=batch.request_counts.total, completed=n_good, failed=n_lines - n_good
    )
    return batch.model_copy(update={"request_counts": counts})
