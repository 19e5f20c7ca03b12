"""The file of keys: how many a name may have, when they end, what is no such file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import Request

from molmo_core.errors import KeyStoreError, Unauthorised
from molmo_server.serve import EXIT_BAD_SETTINGS, run_server
from molmo_server.settings import MolmoSettings
from molmo_server.tenancy.access import Access
from molmo_server.tenancy.store import KeyStore, prefix_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    opened = KeyStore(tmp_path / "keys.db")
    yield opened
    opened.close()


async def test_a_key_ends_when_it_expires(store: KeyStore, tmp_path: Path) -> None:
    now_s = 1000.0
    key = store.create("acme", expires_s=2000.0)
    access = Access(tmp_path / "keys.db", now_s=lambda: now_s)

    async def ask() -> None:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        route = SimpleNamespace(path="/v1/models")
        scope = {"type": "http", "headers": headers, "route": route, "state": {}}
        async for _ in access.check(Request(scope)):
            pass

    async with access.running():
        await ask()
        now_s = 1999.9
        await ask()
        now_s = 2000.0
        with pytest.raises(Unauthorised, match="revoked or expired"):
            await ask()
    [used] = store.usage(n_days=1, now_s=now_s)
    assert (used.day, used.requests) == ("1970-01-01", 2)


def test_two_keys_of_a_name_may_be_active(store: KeyStore) -> None:
    first, second = store.create("acme"), store.create("acme")
    with pytest.raises(KeyStoreError, match=f"revoke one: `molmo keys revoke {prefix_of(first)}"):
        store.create("acme")
    store.revoke(prefix_of(second))
    store.create("acme", expires_s=time.time() - 1)
    third = store.create("acme")  # what was revoked or has expired does not count
    now_s = time.time()
    states = {key.prefix: key.state(now_s) for key in store.all_keys()}
    assert list(states.values()) == ["active", "revoked", "expired", "active"]
    assert [states[prefix_of(key)] for key in (first, third)] == ["active", "active"]


def test_a_file_that_is_no_key_store(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(KeyStoreError, match=r"other\.db cannot be used: file is not a database"):
        KeyStore(path)

    with closing(sqlite3.connect(tmp_path / "newer.db")) as newer:
        newer.execute("PRAGMA user_version = 2")
    with pytest.raises(KeyStoreError, match="it has format 2, this version reads 1"):
        KeyStore(tmp_path / "newer.db")


def test_the_server_does_not_start_with_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = MolmoSettings(checkpoint=folder, keys=tmp_path / "nowhere" / "keys.db")
    assert run_server(settings) == EXIT_BAD_SETTINGS
    assert "keys.db cannot be used" in capsys.readouterr().err
