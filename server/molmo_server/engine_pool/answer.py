"""One connection to an engine, and the answers that come on it, in HTTP/1.1.

Bytes go from the socket through httptools to whoever reads the answer, without anything between:
of a stream of short events most of the cost is what happens for each piece (`make bench
ARGS=gateway`; aiohttp takes about as much for one as all the rest of the way).

A connection has one request at a time. Nothing is compressed, redirects are not followed.

Knows: HTTP answers, sockets. Does not know: which connection is used for what (`wire`), what an
answer says, how long one may take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import cast

import httptools

_MAX_HEAD_BYTES = 65_536
_MANY_BYTES = 65_536
"""More than this is not taken from the socket while nobody reads the answer."""

LOST = OSError
"""What is raised when the other side is gone, is not reached in time, or speaks no HTTP."""


@dataclass(slots=True)
class LastBytes:
    """When some came last, in seconds of `time.monotonic`."""

    at_s: float = 0.0


class BrokenAnswer(ConnectionError):
    """The answer ended before its end, or is none."""


class Connection(asyncio.Protocol):
    """One socket; its answers come one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._is_spoiled = False

    @property
    def is_good(self) -> bool:
        """Another request may be sent on it."""
        transport = self._transport
        return (
            not self._is_spoiled
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    def ask(self, answer: Answer, head: bytes, body: bytes) -> None:
        self._answer = answer
        self._is_spoiled = True  # until the answer is whole
        if self._transport is None or self._transport.is_closing():
            answer.fail(BrokenAnswer("the connection was closed"))
            return
        self._transport.writelines((head, body) if body else (head,))

    def let_go(self, *, can_go_on: bool) -> None:
        """Nobody reads the answer any more."""
        self._answer = None
        self._is_spoiled = not can_go_on

    def cut(self, error: BrokenAnswer | None = None) -> None:
        self._is_spoiled = True
        if self._transport is not None:
            self._transport.abort()
        if self._answer is not None and error is not None:
            self._answer.fail(error)

    def pause(self) -> None:
        assert self._transport is not None
        self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(data)
        else:  # nothing was asked
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None:
            self._answer.connection_lost(exc)


class Answer:
    """What came back to one request. Close it, whatever happens."""

    def __init__(
        self,
        connection: Connection,
        give_back: Callable[[Connection], None],
        noted: LastBytes | None,
    ) -> None:
        self.status = 0
        self.content_type = ""
        """Without parameters, in small letters; empty when it has none."""
        self.is_whole = False
        """All of it has come, if it has not been read yet."""
        self._connection: Connection | None = connection
        self._give_back = give_back
        self._noted = noted
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by the parser, as the other on_…
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._has_head = self._has_length = self._is_interim = self._is_paused = False
        self._can_go_on = False
        self._n_unread_bytes = 0
        self._error: OSError | None = None
        self._take: Callable[[bytes], bool] | None = None
        """Who gets what comes, at once."""
        self._waiter: asyncio.Future[None] | None = None

    # --- for who asked ----------------------------------------------------------------------------

    async def begun(self) -> None:
        """The status is known. Raises OSError."""
        while not self._has_head:
            await self._news()

    async def more(self) -> bytes:
        """All that has come since, waiting for the first of it; b"" at the end. Raises OSError."""
        while not self._pieces:
            if self.is_whole:
                return b""
            await self._news()
        return self._taken()

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Give `take` all that comes, at once, until it returns False; whether there is more.

        `take` is called where bytes arrive and no task is woken for them, which is most of the
        cost of a short event. Raises OSError, and what `take` raises.
        """
        while True:
            if self._pieces and not take(self._taken()):
                return True
            if self.is_whole:
                return False
            news, self._take = self._news(), take
            try:
                await news
                if self._take is None:
                    return True
            finally:
                self._take = None

    async def rest(self) -> bytes:
        """All until the end. Raises OSError."""
        pieces = []
        while piece := await self.more():
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Before its end: the engine drops the request."""
        connection, self._connection, self._parser = self._connection, None, None
        if connection is not None:
            is_done = self.is_whole and not self._is_paused
            connection.let_go(can_go_on=is_done and self._can_go_on)
            self._give_back(connection)

    def _taken(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._n_unread_bytes = 0
        if self._is_paused:
            self._is_paused = False
            if self._connection is not None:
                self._connection.resume()
        return data

    def _news(self) -> asyncio.Future[None]:
        if self._error is not None:
            raise self._error
        if self._connection is None:
            raise BrokenAnswer("the answer was closed")
        self._waiter = self._connection.loop.create_future()
        return self._waiter

    # --- for the connection -----------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        self._n_unread_bytes += len(data)
        if self._noted is not None:
            self._noted.at_s = monotonic()
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._can_go_on = False
            if not self.is_whole:  # else it is about what follows it
                self.fail(BrokenAnswer(f"it is no HTTP ({error})"))
        if self._take is not None and self._pieces:
            try:
                if not self._take(self._taken()):
                    self._take = None
                elif not self.is_whole:
                    return
            except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
                self._take = None  # what comes before that is not for it any more
                if self._waiter is not None and not self._waiter.done():
                    self._waiter.set_exception(error)
        elif self._n_unread_bytes > _MANY_BYTES:
            self._hold_back()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _hold_back(self) -> None:
        if not self._has_head and self._n_unread_bytes > _MAX_HEAD_BYTES:
            self.fail(BrokenAnswer("its head is too long"))
        elif not self.is_whole and not self._pieces:
            # Nobody would take it and let the connection go on.
            self.fail(BrokenAnswer(f"{self._n_unread_bytes} bytes came that are no body"))
        elif not self.is_whole and not self._is_paused and self._connection is not None:
            self._is_paused = True
            self._connection.pause()

    def fail(self, error: OSError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self.is_whole:
            return
        if error is None and self._has_head and not self._has_length and self._error is None:
            self.is_whole = True  # only its end could tell
        self.fail(BrokenAnswer("the connection was closed in the middle"))

    # --- for the parser ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise BrokenAnswer("more came than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # behind the body
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.partition(b";")[0].strip().lower().decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()  # type: ignore[union-attr]
        self._is_interim = self.status < 200
        self._has_head = not self._is_interim

    def on_message_complete(self) -> None:
        if self._is_interim:
            self.content_type, self._has_length = "", False
            return
        self.is_whole = True
        self._can_go_on = self._parser.should_keep_alive()  # type: ignore[union-attr]
