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
    outlet = _Outlet(scope, send)
    try:
        async with opened as (asked, reply):
            tell_checkpoint(scope, asked.answering)
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            relay = relay_for(asked)
            try:
                await _pass_on(reply, relay, outlet)
            finally:
                asked.note_tokens(prompt=relay.n_prompt_tokens, completion=relay.n_tokens)
    except MolmoError as error:
        if relay is None:
            raise
        note_error(scope, error)
        outlet.put(relay.failure(error))
    await outlet.end()


class _Outlet:
    """The pieces of an answer that has begun, on their way to the caller."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._write = piece_writer(scope)
        self._held: list[bytes] = []
        self.is_open = True
        """Else `flush` before the next piece."""

    def put(self, piece: bytes) -> None:
        """Send a piece, or keep it for `flush`."""
        if self._write is not None:
            self.is_open = self._write(piece)
        else:
            self._held.append(piece)
            self.is_open = False

    async def flush(self) -> None:
        """Return when the caller has taken enough for more to be sent."""
        await self._send_held(more_body=True)
        self.is_open = True

    async def end(self) -> None:
        await self._send_held(more_body=False)

    async def _send_held(self, *, more_body: bool) -> None:
        body, self._held = b"".join(self._held), []
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})


async def _pass_on(reply: EngineReply, relay: Relay, outlet: _Outlet) -> None:
    def take(chunk: bytes) -> bool:
        passed = relay.feed(chunk)
        if passed:
            outlet.put(passed)
        return outlet.is_open and not relay.has_ended

    take(reply.first)
    has_more = True
    while has_more and not relay.has_ended:
        if not outlet.is_open:
            await outlet.flush()
        has_more = await reply.pour(take)
    if relay.has_ended:
        await reply.end()
    relay.check_end()


async def send_json(answer: Any, scope: Scope, send: Send) -> None:
    response = Response(orjson.dumps(answer), media_type="application/json")
    await response(scope, _nothing, send)


async def _nothing() -> Any:
    raise RuntimeError("a finished answer reads nothing")
