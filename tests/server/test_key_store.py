"""Keys in a file and in PostgreSQL: how many a name may have, when they end, what is no store."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from fastapi import Request

from molmo_client.__main__ import main
from molmo_core.errors import KeyStoreError, Unauthorised
from molmo_server.serve import EXIT_BAD_SETTINGS, run_server
from molmo_server.settings import MolmoSettings
from molmo_server.tenancy.access import Access
from molmo_server.tenancy.store import KeyStore, Usage, day_of, prefix_of
from tests.support.gateway import running_gateway, until
from tests.support.services import running_postgres


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture
def postgres(database: str) -> str:
    """A database without tables of ours."""
    with psycopg.connect(database) as connection:
        connection.execute("DROP SCHEMA IF EXISTS molmo CASCADE")
    return database


@pytest.fixture(params=["file", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that is not there yet."""
    if request.param == "file":
        return str(tmp_path / "keys.db")
    url: str = request.getfixturevalue("postgres")
    return url


@pytest.fixture
def store(where: str) -> Iterator[KeyStore]:
    opened = KeyStore(where)
    yield opened
    opened.close()


async def test_a_key_ends_when_it_expires(store: KeyStore, where: str) -> None:
    now_s = 1000.0
    key = store.create("acme", expires_s=2000.0)
    access = Access(where, now_s=lambda: now_s)

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


def test_a_key_is_kept_as_it_was_made(store: KeyStore, where: str) -> None:
    text = store.create(
        "acme",
        scope="admin",
        requests_per_min=5_000_000_000,
        visual_tokens_per_min=7,
        n_concurrent=3,
        expires_s=1_900_000_000.25,
    )
    again = KeyStore(where, is_made=False)
    [key] = again.all_keys()
    again.close()
    assert key.is_of(text)
    assert not key.is_of(text[:-1])
    assert (key.prefix, key.name, key.scope) == (prefix_of(text), "acme", "admin")
    limits = (key.requests_per_min, key.visual_tokens_per_min, key.n_concurrent)
    assert limits == (5_000_000_000, 7, 3)
    assert (key.expires_s, key.revoked_s) == (1_900_000_000.25, None)
    revoked = [store.revoke(text), store.revoke(text)]
    assert revoked[0].revoked_s is None
    assert revoked[1].revoked_s is not None
    with pytest.raises(KeyStoreError, match="there is no key that begins with 'molmo-nobody'"):
        store.revoke("molmo-nobody")


def test_usage_adds_up(store: KeyStore) -> None:
    first, second = (prefix_of(store.create(name)) for name in ("beta", "acme"))
    now_s = time.time()
    today, yesterday = day_of(now_s), day_of(now_s - 86_400)
    used = Usage(requests=1, prompt_tokens=20, visual_tokens=10, completion_tokens=5)
    store.add_usage({(first, today): used, (second, today): used + used})
    store.add_usage({(first, today): used, (first, yesterday): used})
    rows = store.usage(n_days=2, now_s=now_s)
    assert [(row.day, row.name, row.requests) for row in rows] == [
        (today, "acme", 2),
        (today, "beta", 2),
        (yesterday, "beta", 1),
    ]
    assert rows[0][3:] == (2, 40, 20, 10)
    assert len(store.usage(n_days=1, now_s=now_s)) == 2


def test_servers_write_at_the_same_time(where: str) -> None:
    """Two keys of a name and no more, every usage counted, whoever comes first."""
    stores = [KeyStore(where) for _ in range(4)]

    def work(store: KeyStore) -> int:
        n_made = 0
        for _ in range(3):
            with suppress(KeyStoreError):
                store.create("acme")
                n_made += 1
        for k in range(20):
            days = [("b", "2026-01-01"), ("a", "2026-01-01")]
            for where_used in days if k % 2 else reversed(days):
                store.add_usage({where_used: Usage(requests=1)})
        return n_made

    with ThreadPoolExecutor(len(stores)) as threads:
        assert sum(threads.map(work, stores)) == 2
    assert len(stores[0].all_keys()) == 2
    for store in stores:
        store.close()


def test_usage_outlives_a_restart_of_the_database(
    caplog: pytest.LogCaptureFixture, postgres: str
) -> None:
    store = KeyStore(postgres)
    key = prefix_of(store.create("acme"))
    with psycopg.connect(postgres, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'molmo'"
        )
    used = {(key, day_of(time.time())): Usage(requests=1)}
    with pytest.raises(KeyStoreError, match="cannot be used"):
        store.add_usage(used)
    store.add_usage(used)
    [row] = store.usage(n_days=1, now_s=time.time())
    store.close()
    assert row.requests == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://acme:a-secret@127.0.0.1:9/keys", "acme:***@127.0.0.1:9/keys cannot be used"),
        ("postgresql://acme:a-secret@127.0.0.1:port/keys", "cannot be used"),
        ("postgresql://acme:a-secret%zz@127.0.0.1/keys", "cannot be used"),
        ("postgresql://127.0.0.1:9/keys?password=a-secret", "keys?password=*** cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used(url: str, says: str) -> None:
    with pytest.raises(KeyStoreError) as refusal:
        KeyStore(url)
    assert says in refusal.value.message
    report = "".join(traceback.format_exception(refusal.value))
    assert "a-secret" not in refusal.value.message + report.replace(repr(url), "")


def test_tables_of_another_version(postgres: str) -> None:
    with pytest.raises(KeyStoreError, match="`molmo keys create` makes the tables"):
        KeyStore(postgres, is_made=False)
    KeyStore(postgres).close()
    with psycopg.connect(postgres) as connection:
        connection.execute("UPDATE molmo.format SET version = 2")
    with pytest.raises(KeyStoreError, match="it has format 2, this version reads 1"):
        KeyStore(postgres)


def test_the_command_works_on_it(postgres: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "acme", "--rpm", "60", "--store", postgres]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["keys", "revoke", text, "--store", postgres]) == 0
    assert main(["keys", "list", "--json", "--store", postgres]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["key"], row["rpm"], row["state"]) == (prefix_of(text), 60, "revoked")


def test_a_gateway_with_keys_in_a_database(
    postgres: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = KeyStore(postgres)
    key = store.create("acme")
    with running_gateway(folder, tmp_path, keys=postgres) as gateway:
        assert gateway.chat("Hi").status_code == 401
        gateway.http.headers["authorization"] = f"Bearer {key}"
        assert gateway.chat("Hi").status_code == 200
        store.revoke(key)
        until(lambda: gateway.chat("Hi").status_code == 401, limit_s=5)
    [row] = store.usage(n_days=1, now_s=time.time())
    store.close()
    assert row.requests >= 1
    assert row.completion_tokens > 0
    assert "secret" not in caplog.text


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
