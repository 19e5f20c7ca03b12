"""The internet on one loopback port: names, the addresses they have, servers behind them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp.abc import ResolveResult

from molmo_server.media.remote import Pinned, RemoteMedia
from molmo_server.settings import MolmoSettings

PUBLIC = "93.184.216.34"
Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"", status: int = 200, **headers: str) -> Serve:
    """A complete answer; `headers` by their names with `_` for `-`."""

    async def serve(writer: asyncio.StreamWriter) -> None:
        fields = {"content-length": str(len(body)), **headers}
        lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items()]
        writer.write(f"HTTP/1.1 {status} X\r\n{''.join(lines)}\r\n".encode() + body)

    return serve


def redirect(location: str, status: int = 302) -> Serve:
    return answer(b"never to be read", status, location=location)


@dataclass(kw_only=True)
class Internet:
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    """What each look-up of a name answers, in turn, and the last answer from then on; a name that
    is not here has the address `PUBLIC`, one with an empty list has none."""
    pages: dict[str, Serve] = field(default_factory=dict)
    """By `host/path`."""
    looked_up: list[str] = field(default_factory=list)
    connected: list[list[str]] = field(default_factory=list)
    """The addresses that each connection was allowed to go to."""
    heads: list[str] = field(default_factory=list)
    """What servers were asked, as it arrived."""
    port: int = 0

    def media(self, **settings: Any) -> RemoteMedia:
        """As the service fetches, but that every address is this loopback port."""
        asked = MolmoSettings(**{"remote_media": "public", "remote_allow_http": True, **settings})
        return RemoteMedia(asked, look_up=self.look_up, pinned=self._pinned)

    async def look_up(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        answers = self.names.get(host, [[PUBLIC]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if not found:
            raise socket.gaierror("no such name")
        return found

    def _pinned(self, addresses: Sequence[str]) -> Pinned:
        self.connected.append(list(addresses))
        return _Loopback(self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            first = await reader.readexactly(1)
            if first == b"\x16":  # TLS: nobody here has a certificate
                self.heads.append((await reader.read(4096)).decode("latin-1"))
                return
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            host = head.lower().partition("\r\nhost: ")[2].partition("\r\n")[0]
            path = head.split(" ")[1]
            await self.pages.get(f"{host}{path}", answer(status=404))(writer)
            await writer.drain()


class _Loopback(Pinned):
    def __init__(self, port: int) -> None:
        super().__init__(["127.0.0.1"])
        self._port = port

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return await super().resolve(host, self._port, family)


@asynccontextmanager
async def internet() -> AsyncIterator[Internet]:
    world = Internet()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def until_its_end() -> None:
            try:
                await world.serve(reader, writer)
            finally:
                writer.close()

        task = asyncio.create_task(until_its_end())
        serving.add(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    world.port = server.sockets[0].getsockname()[1]
    try:
        yield world
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
