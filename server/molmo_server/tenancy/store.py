"""API keys and what was used with them, in a file of SQLite or a database of PostgreSQL.

Of a key only its SHA-256 is kept, and its first letters to show and to find it by.

Knows: what is in the tables, how keys are made and recognised. Does not know: databases
(`databases`), HTTP, what limits do.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from molmo_core.errors import KeyStoreError
from molmo_server.tenancy.databases import open_database

KeyScope = Literal["infer", "admin"]
KeyState = Literal["active", "expired", "revoked"]

_KEY_START = "molmo-"
_N_RANDOM_BYTES = 24  # 32 letters
_PREFIX_CHARS = len(_KEY_START) + 6
_MAX_ACTIVE_KEYS = 2
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as it is stored. Times are seconds since 1970; a limit of None is none."""

    prefix: str
    digest: bytes = field(repr=False)
    name: str
    scope: KeyScope
    requests_per_min: int | None = None
    visual_tokens_per_min: int | None = None
    n_concurrent: int | None = None
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None

    def state(self, now_s: float) -> KeyState:
        if self.revoked_s is not None:
            return "revoked"
        return "expired" if self.expires_s is not None and self.expires_s <= now_s else "active"

    def is_of(self, text: str) -> bool:
        """Whether `text` is this key; takes the same time wherever they differ."""
        return hmac.compare_digest(_digest(text), self.digest)


@dataclass(kw_only=True)
class Usage:
    requests: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    """Those of the prompt's tokens that stand for pictures and frames."""
    completion_tokens: int = 0

    def __add__(self, more: Usage) -> Usage:
        return Usage(
            requests=self.requests + more.requests,
            prompt_tokens=self.prompt_tokens + more.prompt_tokens,
            visual_tokens=self.visual_tokens + more.visual_tokens,
            completion_tokens=self.completion_tokens + more.completion_tokens,
        )


class KeyUsage(NamedTuple):
    """What one key used on one day (UTC); `key` has its first letters."""

    day: str
    name: str
    key: str
    requests: int
    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


def prefix_of(text: str) -> str:
    """The part of a key that may be shown."""
    return text[:_PREFIX_CHARS]


def day_of(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


class KeyStore:
    """Open until `close`, for use by any thread. All methods raise KeyStoreError."""

    def __init__(self, where: str | Path, *, is_made: bool = True) -> None:
        """`where`: a file, or `postgresql://user:password@host/database`.

        `is_made`: make what is not there, instead of refusing.
        """
        self._database = open_database(where, is_made=is_made)

    def close(self) -> None:
        self._database.close()

    # --- keys -----------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        scope: KeyScope = "infer",
        requests_per_min: int | None = None,
        visual_tokens_per_min: int | None = None,
        n_concurrent: int | None = None,
        expires_s: float | None = None,
    ) -> str:
        """Make a key for `name` and return it; it cannot be found out later.

        Refused for a name that has two active keys.
        """
        if not _NAME.fullmatch(name):
            raise KeyStoreError(
                f"got the name {name[:80]!r}; use 1 to 64 letters, digits, dots, - and _"
            )
        text = _KEY_START + secrets.token_urlsafe(_N_RANDOM_BYTES)
        key = Key(
            prefix=prefix_of(text),
            digest=_digest(text),
            name=name,
            scope=scope,
            requests_per_min=requests_per_min,
            visual_tokens_per_min=visual_tokens_per_min,
            n_concurrent=n_concurrent,
            created_s=time.time(),
            expires_s=expires_s,
        )
        with self._database.transaction(writes=True) as execute:
            rows = execute("SELECT * FROM keys WHERE name = ?", [name])
            active = [k.prefix for k in map(_key, rows) if k.state(key.created_s) == "active"]
            if len(active) >= _MAX_ACTIVE_KEYS:
                raise KeyStoreError(
                    f"{name} has {len(active)} active keys, {' and '.join(active)}, and "
                    f"{_MAX_ACTIVE_KEYS} are allowed; revoke one: `molmo keys revoke {active[0]}`"
                )
            execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(key))
        return text

    def all_keys(self) -> list[Key]:
        """All that were ever made, oldest first."""
        with self._database.transaction(writes=False) as execute:
            return [_key(row) for row in execute("SELECT * FROM keys ORDER BY created_s", [])]

    def revoke(self, prefix: str) -> Key:
        """End a key for good; returns it."""
        shown = prefix_of(prefix)  # whoever gives the whole key does not see it again
        with self._database.transaction(writes=True) as execute:
            rows = execute("SELECT * FROM keys WHERE prefix = ?", [shown])
            if not rows:
                raise KeyStoreError(
                    f"there is no key that begins with {shown!r}; `molmo keys list` shows them all"
                )
            execute(
                "UPDATE keys SET revoked_s = coalesce(revoked_s, ?) WHERE prefix = ?",
                [time.time(), shown],
            )
        return _key(rows[0])

    # --- usage ----------------------------------------------------------------------------------

    def add_usage(self, used: Mapping[tuple[str, str], Usage]) -> None:
        """Add to what is written, by prefix and day."""
        with self._database.transaction(writes=True) as execute:
            for (prefix, day), usage in used.items():
                execute(
                    "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (prefix, day) DO UPDATE SET "
                    "requests = usage.requests + excluded.requests, "
                    "prompt_tokens = usage.prompt_tokens + excluded.prompt_tokens, "
                    "visual_tokens = usage.visual_tokens + excluded.visual_tokens, "
                    "completion_tokens = usage.completion_tokens + excluded.completion_tokens",
                    [prefix, day, *astuple(usage)],
                )

    def usage(self, *, n_days: int, now_s: float) -> list[KeyUsage]:
        """Of the last days with today, newest day first."""
        first = datetime.fromtimestamp(now_s, UTC).date() - timedelta(days=n_days - 1)
        with self._database.transaction(writes=False) as execute:
            rows = execute(
                "SELECT day, name, prefix, requests, prompt_tokens, visual_tokens, "
                "completion_tokens FROM usage JOIN keys USING (prefix) WHERE day >= ? "
                "ORDER BY day DESC, name, prefix",
                [first.isoformat()],
            )
            return [KeyUsage(*row) for row in rows]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _key(row: tuple[object, ...]) -> Key:
    return Key(**dict(zip(Key.__dataclass_fields__, row, strict=True)))  # type: ignore[arg-type]
