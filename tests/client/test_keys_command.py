"""`molmo keys`: what it prints where, and what it refuses."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from molmo_client.__main__ import main
from molmo_server.tenancy.store import KeyStore, Usage, day_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, output, errors) of a command on one file."""

    def run(*tokens: str) -> tuple[int, str, str]:
        code = main(["keys", *tokens, "--store", str(path)])
        return code, *capsys.readouterr()

    return run


def test_a_key_is_shown_once(run: Run, path: Path) -> None:
    code, out, err = run("create", "acme", "--rpm", "60", "--visual-tpm", "9000")
    key = out.strip()
    assert code == 0
    assert re.fullmatch(r"molmo-[\w-]{32}", key)
    assert key[:12] in err
    assert key not in err
    assert path.stat().st_mode & 0o077 == 0

    code, out, _ = run("list", "--json")
    [row] = json.loads(out)
    assert code == 0
    assert (row["key"], row["name"], row["scope"], row["state"]) == (
        key[:12],
        "acme",
        "infer",
        "active",
    )
    assert (row["rpm"], row["visual_tpm"], row["concurrent"]) == (60, 9000, None)
    assert row["expires"] is None
    assert key not in out


def test_rotation_and_revocation(run: Run) -> None:
    first = run("create", "acme")[1][:12]
    run("create", "acme", "--expires-days", "30")
    code, out, err = run("create", "acme")
    assert (code, out) == (1, "")
    assert f"revoke one: `molmo keys revoke {first}`" in err

    code, out, err = run("revoke", first)
    assert (code, out, err) == (0, "", f"molmo: {first} of acme is revoked\n")
    assert run("create", "acme", "--scope", "admin")[0] == 0
    header, *rows = run("list")[1].splitlines()
    assert header.split()[:4] == ["key", "name", "scope", "state"]
    assert [row.split()[3] for row in rows] == ["revoked", "active", "active"]


def test_usage(run: Run, path: Path) -> None:
    assert run("create", "acme")[0] == 0
    assert run("usage")[:2] == (0, "")
    store = KeyStore(path)
    [key] = store.all_keys()
    now_s = time.time()
    for age in (0, 0, 3):
        day = day_of(now_s - age * 86_400)
        store.add_usage({(key.prefix, day): Usage(requests=2, visual_tokens=7)})
    store.close()

    rows = json.loads(run("usage", "--json")[1])
    assert [(row["day"], row["requests"], row["visual_tokens"]) for row in rows] == [
        (day_of(now_s), 4, 14),
        (day_of(now_s - 3 * 86_400), 2, 7),
    ]
    header, *lines = run("usage", "--days", "2")[1].splitlines()
    assert header.split()[:4] == ["day", "name", "key", "requests"]
    assert [line.split()[:4] for line in lines] == [[day_of(now_s), "acme", key.prefix, "4"]]


@pytest.mark.parametrize(
    ("tokens", "code", "says"),
    [
        (("list",), 1, "`molmo keys create` makes it"),
        (("create", "two words"), 1, "use 1 to 64 letters"),
        (("create", "acme", "--rpm", "0"), 2, "Must be >= 1"),
        (("create", "acme", "--scope", "all"), 2, "infer"),
        (("create", "acme", "--expires-days", "0"), 2, "Must be > 0"),
    ],
)
def test_what_is_refused(run: Run, tokens: tuple[str, ...], code: int, says: str) -> None:
    got, out, err = run(*tokens)
    assert (got, out) == (code, "")
    assert says in err


def test_an_unknown_key_cannot_be_revoked(run: Run) -> None:
    run("create", "acme")
    code, _, err = run("revoke", "molmo-nobody")
    assert code == 1
    assert "there is no key that begins with 'molmo-nobody'" in err
