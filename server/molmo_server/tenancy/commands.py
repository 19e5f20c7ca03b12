"""`molmo keys`: make, show and revoke keys, and what was used with them.

Works on the file or the database alone: a server that runs sees the change within a second, one
that does not run when it starts.

Knows: options and tables. Does not know: what a key opens.
"""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from molmo_server.tenancy.store import Key, KeyScope, KeyStore, prefix_of

app = App(
    name="molmo keys",
    help="Make, show and revoke the API keys of a server, and what was used with them.",
    version_flags=(),
)
StorePlace = Annotated[
    str,
    Parameter(
        help="The file of keys, or postgresql://USER:PASSWORD@HOST/DATABASE; MOLMO_KEYS names it "
        "to the server"
    ),
]
Limit = Annotated[int | None, Parameter(validator=Number(gte=1))]
AsJson = Annotated[bool, Parameter(negative=(), help="Print JSON")]
_DAY_S = 86_400


@app.command(name="create")
def create_command(
    name: Annotated[str, Parameter(help="Whose key it is; two may be active at a time")],
    /,
    *,
    store: StorePlace,
    scope: Annotated[KeyScope, Parameter(help="admin: also the routes under /admin")] = "infer",
    rpm: Annotated[Limit, Parameter(help="Requests a minute; else without a limit")] = None,
    visual_tpm: Annotated[Limit, Parameter(help="Visual tokens a minute, likewise")] = None,
    concurrent: Annotated[Limit, Parameter(help="Requests at the same time, likewise")] = None,
    expires_days: Annotated[
        float | None, Parameter(validator=Number(gt=0), help="Good for so long; else for good")
    ] = None,
) -> None:
    """Make a key and print it, which can be done only now; makes the file if there is none."""
    with _opened(store, is_made=True) as keys:
        text = keys.create(
            name,
            scope=scope,
            requests_per_min=rpm,
            visual_tokens_per_min=visual_tpm,
            n_concurrent=concurrent,
            expires_s=None if expires_days is None else time.time() + expires_days * _DAY_S,
        )
    sys.stdout.write(f"{text}\n")
    sys.stderr.write(
        f"molmo: keep it, it is not stored; {prefix_of(text)} is how it is shown from now on\n"
    )


@app.command(name="list")
def list_command(*, store: StorePlace, json: AsJson = False) -> None:
    """All keys that were made, oldest first, without what makes them work."""
    with _opened(store) as keys:
        rows = [_shown(key) for key in keys.all_keys()]
    _print(rows, as_json=json, if_none="no keys yet")


@app.command(name="revoke")
def revoke_command(
    prefix: Annotated[str, Parameter(help="The key's first letters, as `list` shows them")],
    /,
    *,
    store: StorePlace,
) -> None:
    """End a key for good."""
    with _opened(store) as keys:
        key = keys.revoke(prefix)
    sys.stderr.write(f"molmo: {key.prefix} of {key.name} is revoked\n")


@app.command(name="usage")
def usage_command(
    *,
    store: StorePlace,
    days: Annotated[
        int, Parameter(validator=Number(gte=1, lte=3660), help="So many with today, in UTC")
    ] = 30,
    json: AsJson = False,
) -> None:
    """What each key used, day by day; a running server writes twice a second."""
    with _opened(store) as keys:
        rows = [row._asdict() for row in keys.usage(n_days=days, now_s=time.time())]
    _print(rows, as_json=json, if_none="nothing was used")


@contextmanager
def _opened(where: str, *, is_made: bool = False) -> Iterator[KeyStore]:
    keys = KeyStore(where, is_made=is_made)
    try:
        yield keys
    finally:
        keys.close()


def _shown(key: Key) -> dict[str, Any]:
    return {
        "key": key.prefix,
        "name": key.name,
        "scope": key.scope,
        "state": key.state(time.time()),
        "rpm": key.requests_per_min,
        "visual_tpm": key.visual_tokens_per_min,
        "concurrent": key.n_concurrent,
        "created": _moment(key.created_s),
        "expires": _moment(key.expires_s),
    }


def _moment(time_s: float | None) -> str | None:
    return None if time_s is None else datetime.fromtimestamp(time_s, UTC).isoformat("T", "seconds")


def _print(rows: Sequence[dict[str, Any]], *, as_json: bool, if_none: str) -> None:
    if as_json:
        sys.stdout.write(f"{json_format.dumps(rows, indent=2)}\n")
        return
    if not rows:
        sys.stderr.write(f"molmo: {if_none}\n")
        return
    cells = [list(rows[0]), *(["-" if v is None else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")
