"""Time limits of a connection, so that slow callers cannot fill the server.

uvicorn itself waits for the head of a request, and for a reader of an answer, as long as they
please. Here a connection is closed when

* a head has not arrived within its time, from the connection or the head's first byte (408), or is
  too large (431);
* its caller does not take what it is sent: the request is then dropped, at the engine too;
* there are too many others (503).

The time of a body is limited where it is read (`routes.body`), idle connections by uvicorn.

Knows: uvicorn's protocol on httptools (0.40 to 0.54), HTTP/1.1. Does not know: the application.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import ClassVar

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from molmo_core.errors import Busy, InvalidRequest, MolmoError
from molmo_server.errors import error_body, refusal

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 64 * 1024
_RETRY_S = 2
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


WritePiece = Callable[[bytes], bool]
_WRITE_PIECE = "molmo.write_piece"
_LEAVING = "molmo.leaving"


def piece_writer(scope: Scope) -> WritePiece | None:
    """Writes a piece of the body of an answer that has begun, at once; not its last one.

    What it returns False for is written too, but the caller is slow: the next ASGI message waits
    for them. None where another server called the application.
    """
    write: WritePiece | None = scope.get("extensions", {}).get(_WRITE_PIECE)
    return write


def leaving_of(scope: Scope) -> Leaving | None:
    """Of the caller of a request; None where another server called the application."""
    found: Leaving | None = scope.get("extensions", {}).get(_LEAVING)
    return found


class Leaving:
    """Whether a caller has gone, and who is told when it goes: no task has to wait for that."""

    def __init__(self) -> None:
        self.has_left = False
        self._told: set[Callable[[], object]] = set()

    def tell(self, who: Callable[[], object]) -> None:
        """Call `who` when the caller goes."""
        self._told.add(who)

    def tell_no_more(self, who: Callable[[], object]) -> None:
        self._told.discard(who)

    def note(self) -> None:
        """It has gone."""
        self.has_left = True
        for tell in self._told:
            tell()


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    max_connections: int
    head_timeout_s: float
    write_timeout_s: float


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[ConnectionLimits]

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _n_head_bytes = 0

    # --- the head ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._leaving = Leaving()
        allowed = self.limits.max_connections
        if len(self.connections) > allowed:
            message = f"{allowed} connections are open, which is all this server takes"
            self._refuse(Busy(f"{message}; send the request again later", retry_after_s=_RETRY_S))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        is_of_a_body = self.cycle is not None and self.cycle.more_body  # perhaps answered already
        super().data_received(data)
        if not self._is_awaiting_head or self.transport.is_closing():
            return
        if self._head_timer is None:
            self._await_head()
        if is_of_a_body:
            return
        self._n_head_bytes += len(data)
        if self._n_head_bytes > _MAX_HEAD_BYTES:
            self._refuse(
                refusal(
                    431,
                    f"the head of the request has more than {_MAX_HEAD_BYTES:,} bytes, which is "
                    "what is allowed; send shorter headers",
                )
            )

    def on_headers_complete(self) -> None:
        self._cancel_head_timer()
        self._n_head_bytes = 0
        if not self.flow.write_paused:
            self._cancel_write_timer()  # it was about the answer before
        super().on_headers_complete()
        writing = partial(self._write_piece, self.cycle)
        self.scope["extensions"] = {
            _WRITE_PIECE: writing,  # type: ignore[dict-item]
            _LEAVING: self._leaving,  # type: ignore[dict-item]
        }

    @property
    def _is_awaiting_head(self) -> bool:
        """Nothing is being answered; bytes that come belong to the next head."""
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._n_head_bytes == 0:  # nothing was asked
            self.transport.close()
            return
        limit = f"{self.limits.head_timeout_s:g} s"
        self._refuse(
            refusal(408, f"the head of the request was not complete after {limit}; send it faster")
        )

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # --- what is written --------------------------------------------------------------------------

    def _write_piece(self, cycle: RequestResponseCycle, body: bytes) -> bool:
        """As `cycle.send` does with a body, without a message and a coroutine for it."""
        if not cycle.disconnected:
            is_chunked = cycle.chunked_encoding
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if is_chunked else body)
        return not self.flow.write_paused

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:  # closing would wait for it for good
            self._await_reader()

    def _await_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.limits.write_timeout_s, self._reader_is_late
            )

    def _reader_is_late(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() > 0:
            logger.warning(
                "a caller did not take its answer within %g s and was cut off",
                self.limits.write_timeout_s,
            )
            # Without a reset the system would keep what was not taken, for minutes.
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE
            )
            self.transport.abort()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- the end ----------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._cancel_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._leaving.note()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("this is no HTTP request that can be read; send HTTP/1.1"))

    def _refuse(self, error: MolmoError) -> None:
        """Answer what never became a request, and close."""
        self._cancel_head_timer()
        body = error_body(error)
        retry = f"retry-after: {_RETRY_S}\r\n" if error.retry_after_s is not None else ""
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-content-type-options: nosniff\r\ncache-control: no-store\r\n{retry}"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """What uvicorn makes a connection of."""
    made: Callable[..., type[GuardedProtocol]] = type
    return made("LimitedProtocol", (GuardedProtocol,), {"limits": limits})
