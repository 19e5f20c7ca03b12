"""A line of a batch as a request to this application: the same checks, limits and answers.

Knows: ASGI. Does not know: batches, when to ask again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Scope

from molmo_server.tenancy.callers import Caller, Errand, set_caller

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Reply:
    status: int = 500
    """Of an application that broke: the status that a web server gives then."""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    @property
    def request_id(self) -> str:
        return self.headers.get(b"x-request-id", b"").decode("latin-1")

    @property
    def retry_after_s(self) -> float | None:
        told = self.headers.get(b"retry-after", b"")
        return float(told) if told.isdigit() else None


async def ask(app: ASGIApp, path: str, body: bytes, errand: Errand) -> Reply:
    """Send a request for whoever the errand is for, and wait for the whole answer.

    Raises CancelledError when it is not wanted any more.
    """
    reply, pieces = Reply(), bytearray()
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # nobody leaves
        raise AssertionError("never set")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status, reply.headers = message["status"], dict(message["headers"])
        else:
            pieces.extend(message.get("body", b""))

    scope = _scope(path, len(body))
    set_caller(scope, Caller(errand=errand))
    try:
        await app(scope, receive, send)
    # The edge, as the web server is for other requests: the log has the reason.
    except Exception:
        logger.exception("a line of a batch had no whole answer")
        return Reply()
    asking = asyncio.current_task()
    if asking is not None and asking.cancelling():  # the edge answers that, as to other callers
        raise asyncio.CancelledError
    reply.body = bytes(pieces)
    return reply


def _scope(path: str, n_bytes: int) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"batches"),
            (b"content-type", b"application/json"),
            (b"content-length", str(n_bytes).encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
    }
