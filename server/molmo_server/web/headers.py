"""What every answer tells a browser, and which foreign pages may ask.

Answers are data: nothing in them is to be run, framed or guessed at, and nobody is to store them.
Only the page under /docs shows something, in its own style, and runs nothing either.

Knows: headers. Does not know: what is answered.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from molmo_server.settings import MolmoSettings
from molmo_server.web.docs_page import STYLE_SOURCE

Headers = Sequence[tuple[bytes, bytes]]

_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_PAGE_POLICY = _DATA_POLICY + f"; style-src {STYLE_SOURCE}".encode()
DOCS = "/docs"
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
    own = _PAGE if path == DOCS else _DATA
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
