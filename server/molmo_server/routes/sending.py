"""Answers on their way to the caller: whole, or while the engine gives them.

Knows: when a stream has begun, and how it ends. Does not know: what events say (relays do).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Scope, Send

from molmo_core.errors import MolmoError
from molmo_server.engine_pool import EngineReply
from molmo_server.errors import note_error
from molmo_server.telemetry import tell_checkpoint
from molmo_server.web.connections import piece_writer

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect events
]


class Relay(Protocol):
    """The engine's bytes go in, the caller's come out, until `has_ended`."""

    @property
    def has_ended(self) -> bool: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_prompt_tokens(self) -> int | None: ...

    def feed(self, chunk: bytes) -> bytes: ...

    def check_end(self) -> None: ...

    def failure(self, error: MolmoError) -> bytes: ...


class Asked(Protocol):
    answering: str

    def note_tokens(self, *, prompt: int | None, completion: int) -> None: ...


AskedT = TypeVar("AskedT", bound=Asked)


async def send_stream(
    opened: AbstractAsyncContextManager[tuple[AskedT, EngineReply]],
    relay_for: Callable[[AskedT], Relay],
    scope: Scope,
    send: Send,
) -> None:
    """Errors before the first byte are raised, later ones end the stream as its relay says."""
    relay: Relay | None = None
    try:
        async with opened as (asked, reply):
            tell_checkpoint(scope, asked.answering)
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            relay = relay_for(asked)
            try:
                await _pass_on(reply, relay, _Outlet(scope, send))
            finally:
                asked.note_tokens(prompt=relay.n_prompt_tokens, completion=relay.n_tokens)
    except MolmoError as error:
        if relay is None:
            raise
        note_error(scope, error)
        body = relay.failure(error)
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class _Outlet:
    """The pieces of an answer that has begun, on their way to the caller."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._held: list[bytes] = []
        self.put = piece_writer(scope) or self._hold
        """Sends a piece, or keeps it for `flush`; False: to be flushed before the next."""

    def _hold(self, piece: bytes) -> bool:
        self._held.append(piece)
        return False

    async def flush(self) -> None:
        """Return when the caller has taken enough for more to be sent."""
        body, self._held = b"".join(self._held), []
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


async def _pass_on(reply: EngineReply, relay: Relay, outlet: _Outlet) -> None:
    def take(chunk: bytes) -> bool:
        passed = relay.feed(chunk)
        return (not passed or outlet.put(passed)) and not relay.has_ended

    is_open, has_more = take(reply.first), True
    while has_more and not relay.has_ended:
        if not is_open:
            await outlet.flush()
        has_more = await reply.pour(take)
        is_open = not has_more  # there is more: it was `take` that had enough
    await outlet.flush()
    if relay.has_ended:
        await reply.end()
    relay.check_end()


async def send_json(answer: Any, scope: Scope, send: Send) -> None:
    response = Response(orjson.dumps(answer), media_type="application/json")
    await response(scope, _nothing, send)


async def _nothing() -> Any:
    raise RuntimeError("a finished answer reads nothing")
