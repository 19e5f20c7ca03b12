"""Where keys and usage are kept: a file of SQLite, or PostgreSQL, which several gateways may share.

Both are used with the same SQL, one transaction at a time, one writer at a time. The file is in WAL
mode, so that `molmo keys` may write while a server reads: put it on a local disk. A connection to
PostgreSQL that broke is made anew at the next use. Its password is in no message.

Knows: the two databases, how each begins a transaction. Does not know: what is stored.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from molmo_core.errors import KeyStoreError

if TYPE_CHECKING:
    import psycopg

POSTGRES = ("postgresql://", "postgres://")
_PASSWORD = re.compile(r"://[^:@/?#]*:(.+)@|[?&](?:ssl)?password=([^&]+)")
_PATIENCE_S = 5
"""How long another writer is waited for, and a server that does not answer."""
_WRITERS_LOCK = 5_073_677_218
"""Any number that nobody else takes in the same database."""
_FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS keys (
    prefix TEXT PRIMARY KEY, digest {bytes} NOT NULL, name TEXT NOT NULL, scope TEXT NOT NULL,
    requests_per_min BIGINT, visual_tokens_per_min BIGINT, n_concurrent BIGINT,
    created_s {real} NOT NULL, expires_s {real}, revoked_s {real}
);
CREATE TABLE IF NOT EXISTS usage (
    prefix TEXT NOT NULL, day TEXT NOT NULL, requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL, visual_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL, PRIMARY KEY (prefix, day)
);
"""

Execute = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]
"""Runs a statement with `?` for its values; returns the rows, if it has any."""


class Database(Protocol):
    """Open until `close`, for use by any thread."""

    def transaction(self, *, writes: bool) -> AbstractContextManager[Execute]:
        """What is written in the block is written whole or not at all.

        Raises KeyStoreError.
        """

    def close(self) -> None: ...


def open_database(where: str | Path, *, is_made: bool) -> Database:
    """`is_made`: make the tables where there are none, instead of refusing.

    Raises KeyStoreError.
    """
    if isinstance(where, str) and where.startswith(POSTGRES):
        return PostgresServer(where, is_made=is_made)
    return SqliteFile(Path(where), is_made=is_made)


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    for secret in _secrets(url):
        url = url.replace(secret, "***")
    return url


def _secrets(url: str) -> set[str]:
    """The passwords of a URL, as they are written there and as they are meant."""
    written = {found for groups in _PASSWORD.findall(url) for found in groups if found}
    return written | {unquote(secret) for secret in written}


def _check_format(version: int) -> None:
    if version != _FORMAT:
        raise KeyStoreError(f"it has format {version}, this version reads {_FORMAT}")


class SqliteFile:
    def __init__(self, path: Path, *, is_made: bool) -> None:
        self._path = path
        self._lock = threading.Lock()
        if not is_made and not path.is_file():
            raise KeyStoreError(f"there is no file {path}; `molmo keys create` makes it")
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(
                path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._prepare()
        except (KeyStoreError, sqlite3.Error) as error:
            self._db.close()
            raise self._unusable(error) from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            tables = _TABLES.format(bytes="BLOB", real="REAL")
            self._db.executescript(
                f"BEGIN IMMEDIATE;{tables}PRAGMA user_version = {_FORMAT};COMMIT;"
            )
        else:
            _check_format(version)

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Execute]:
        with self._lock:
            try:
                with self._db:
                    if writes:
                        self._db.execute("BEGIN IMMEDIATE")
                    yield self._execute
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _execute(self, statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, values).fetchall()

    def _unusable(self, error: Exception) -> KeyStoreError:
        return KeyStoreError(
            f"the key store {self._path} cannot be used: {error}; name a file that "
            "`molmo keys create` made, on a local disk, in a folder that can be written"
        )

    def close(self) -> None:
        with self._lock:
            self._db.close()


class PostgresServer:
    """Its tables are in a schema `molmo` of the database that the URL names."""

    def __init__(self, url: str, *, is_made: bool) -> None:
        import psycopg  # not needed with a file

        self._errors = (psycopg.Error, ValueError)  # the second: a URL that cannot be read
        self._url = url
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        try:
            self._prepare(is_made)
        except KeyStoreError:
            self.close()
            raise

    def _prepare(self, is_made: bool) -> None:
        with self.transaction(writes=True) as execute:
            if not execute("SELECT 1 FROM pg_namespace WHERE nspname = ?", ["molmo"]):
                if not is_made:
                    raise KeyStoreError(
                        f"there are no keys in {without_password(self._url)}; "
                        "`molmo keys create` makes the tables"
                    )
                self._make(execute)
            [[version]] = execute("SELECT version FROM molmo.format", [])
        try:
            _check_format(version)
        except KeyStoreError as error:
            raise self._unusable(error) from error

    def _make(self, execute: Execute) -> None:
        execute("CREATE SCHEMA molmo", [])
        execute("CREATE TABLE molmo.format (version BIGINT NOT NULL)", [])
        execute("INSERT INTO molmo.format VALUES (?)", [_FORMAT])
        for table in _TABLES.format(bytes="BYTEA", real="DOUBLE PRECISION").split(";\n"):
            execute(table, [])

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Execute]:
        with self._lock:
            try:
                connection = self._connected()
                with connection.transaction(), connection.cursor() as cursor:

                    def execute(statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
                        cursor.execute(statement.replace("?", "%s").encode(), list(values))
                        return cursor.fetchall() if cursor.description else []

                    # Of the transaction, not the connection, for the same reason.
                    cursor.execute(
                        "SET LOCAL search_path TO molmo;"
                        f"SET LOCAL statement_timeout TO {_PATIENCE_S * 1000}".encode()
                    )
                    if writes:  # one writer at a time, also among servers
                        execute("SELECT pg_advisory_xact_lock(?)", [_WRITERS_LOCK])
                    yield execute
            except self._errors as error:
                self._disconnect()
                raise self._unusable(error) from None  # its own words may quote the password
            except KeyStoreError:
                if self._connection is not None and self._connection.broken:
                    self._disconnect()
                raise

    def _connected(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None:
            import psycopg

            self._connection = psycopg.connect(
                self._url,
                autocommit=True,  # so that only `transaction` begins one
                connect_timeout=_PATIENCE_S,
                prepare_threshold=None,  # a pool between may give each transaction another one
                tcp_user_timeout=_PATIENCE_S * 1000,
                application_name="molmo",
            )
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _unusable(self, error: Exception) -> KeyStoreError:
        # libpq quotes what it cannot read of a URL.
        said = " ".join(str(error).split())
        for secret in _secrets(self._url):
            said = said.replace(secret, "***")
        return KeyStoreError(
            f"the key store {without_password(self._url)} cannot be used: {said}; name a database "
            "that is there, of a server that answers, and a user that may make a schema in it"
        )

    def close(self) -> None:
        with self._lock:
            self._disconnect()
