"""What every answer tells a browser, and which foreign pages may ask.

Answers are data: nothing in them is to be run, framed or guessed at, and nobody is to store them.
Only the page under /docs shows something; it loads its scripts from a public host that is named
here and may do so nowhere else.

Knows: headers. Does not know: what is answered.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from molmo_server.settings import MolmoSettings

Headers = Sequence[tuple[bytes, bytes]]

_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_PAGE_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    b"style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    b"img-src data: https://fastapi.tiangolo.com; connect-src 'self'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_DOCS = "/docs"
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_DATA = (*_ALWAYS, (b"content-security-policy", _DATA_POLICY))
_PAGE = (*_ALWAYS, (b"content-security-policy", _PAGE_POLICY))
_UNSTORED = (b"cache-control", b"no-store")
_READABLE = (
    "retry-after",
    "x-molmo-checkpoint",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-visual-tokens",
    "x-ratelimit-remaining-visual-tokens",
    "x-ratelimit-reset-visual-tokens",
    "x-request-id",
)
_PREFLIGHT_S = 600


def browser_headers(path: str, answer: Headers) -> Headers:
    """To be added to an answer that has the headers `answer`."""
    own = _PAGE if path == _DOCS else _DATA
    if any(name == b"cache-control" for name, _ in answer):
        return own
    return (*own, _UNSTORED)


def let_pages_ask(app: Starlette, settings: MolmoSettings) -> None:
    """Let pages of the settings' origins ask, with a key of their own; without any, none may."""
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("authorization", "content-type"),
            expose_headers=_READABLE,
            max_age=_PREFLIGHT_S,
        )
