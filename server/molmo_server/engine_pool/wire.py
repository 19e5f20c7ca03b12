"""Asking one engine over HTTP/1.1: where it is, requests, connections that are kept.

A connection (`answer`) is used again when its answer was read to the end, and cut otherwise, by
which the engine learns that nobody waits. Nothing is sent twice.

Knows: addresses, requests, which connections are idle. Does not know: what is asked, how answers
are read, how long one may take.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from socket import SOCK_STREAM
from types import MappingProxyType
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from molmo_server.engine_pool.answer import Answer, BrokenAnswer, Connection, LastBytes

_IDLE_CONNECTION_S = 2.0  # the engine closes them after 5: never use one that is just closing
_PORTS = {"http": 80, "https": 443}
_NEXT_ADDRESS_S = 0.25
"""A host's next address is tried beside those that have not answered for so long."""


@dataclass(frozen=True, kw_only=True)
class EngineAddress:
    """A Unix socket, or the base URL of a server."""

    socket: Path | None = None
    url: str = "http://engine"

    @cached_property
    def host(self) -> str:
        """As requests name it."""
        return urlsplit(self.url).netloc

    @cached_property
    def _tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.url.startswith("https:") else None

    async def connect(self) -> Connection:
        """To the first address that answers, of a host that has several. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.socket is not None:
            _, connection = await loop.create_unix_connection(
                lambda: Connection(loop), str(self.socket)
            )
            return connection
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        # Not by the loop itself: uvloop tries addresses one after the other.
        addresses = await loop.getaddrinfo(host, port, type=SOCK_STREAM)
        connected = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S)
        _, connection = await loop.create_connection(
            lambda: Connection(loop),
            sock=connected,
            ssl=self._tls,
            server_hostname=host if self._tls else None,
        )
        return connection


class EngineClient:
    """Asks one engine. Use it inside one event loop; `close` ends all that is going on."""

    def __init__(self, address: EngineAddress, *, connect_timeout_s: float) -> None:
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        # No limit here: how many requests run is decided at admission.
        self._asked: set[Connection] = set()
        self._idle: list[Connection] = []
        """The one used last comes last."""
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def get(self, path: str) -> Answer:
        """Its head has come. Raises OSError."""
        return await self._ask([f"GET {path} HTTP/1.1", f"host: {self._address.host}"])

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        noted: LastBytes | None = None,
    ) -> Answer:
        """JSON; the head of the answer has come. `noted`: where to write when anything comes.

        Raises OSError.
        """
        lines = [
            f"POST {path} HTTP/1.1",
            f"host: {self._address.host}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return await self._ask(lines, body, noted)

    async def _ask(
        self, lines: list[str], body: bytes = b"", noted: LastBytes | None = None
    ) -> Answer:
        head = "\r\n".join((*lines, "\r\n")).encode("latin-1")
        connection = self._kept() or await self._connected()
        self._asked.add(connection)
        answer = Answer(connection, self._take_back, noted)
        connection.ask(answer, head, body)
        try:
            await answer.begun()
        except BaseException:
            answer.close()
            raise
        return answer

    async def _connected(self) -> Connection:
        async with asyncio.timeout(self._connect_timeout_s):
            connection = await self._address.connect()
        if self._is_closed:
            connection.cut(BrokenAnswer("the engine was given up"))
        return connection

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_good:
                return connection
        return None

    def _take_back(self, connection: Connection) -> None:
        """Its answer is read, or not wanted any more."""
        self._asked.discard(connection)
        if self._is_closed or not connection.is_good:
            connection.cut()
            return
        connection.idle_since_s = connection.loop.time()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = connection.loop.call_later(_IDLE_CONNECTION_S, self._close_idle)

    def _close_idle(self) -> None:
        """Those that were not used for long; look again as long as there are others."""
        self._sweep, kept = None, []
        for connection in self._idle:
            left_s = connection.idle_since_s + _IDLE_CONNECTION_S - connection.loop.time()
            if left_s <= 0 or not connection.is_good:
                connection.cut()
                continue
            kept.append(connection)
            if self._sweep is None:
                self._sweep = connection.loop.call_later(left_s, self._close_idle)
        self._idle = kept

    def close(self) -> None:
        """Answers that are being read break off."""
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in (*self._asked, *self._idle):
            connection.cut(BrokenAnswer("the engine was given up"))
        self._idle.clear()
