"""A network that fails as networks do: what comes back is late, cut, or not what it was.

Requests go through as they are. Everything runs in the event loop of the test, so that whatever is
left at the end can be counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

_BLOCK_BYTES = 65_536
_LATE_S = 0.1
_DRIP_S = 0.05


class Fault(StrEnum):
    NONE = "none"
    LATE = "late"  # every piece comes a while later
    REFUSED = "refused"  # the connection is reset at once
    SILENT = "silent"  # not a byte comes back, and the connection stays
    CUT = "cut"  # reset after some bytes
    CLOSED = "closed"  # ended in order after some bytes, while requests may still be sent
    GARBAGE = "garbage"  # from the first byte on
    GARBLED = "garbled"  # after some bytes
    DRIP = "drip"  # after some bytes one at a time, with a pause after each


@dataclass(kw_only=True)
class FaultyProxy:
    """Passes on to `target`, a Unix socket or a port of this machine."""

    target: Path | int
    fault: Fault = Fault.NONE
    after_bytes: int = 300
    url: str = ""
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def end(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault is Fault.REFUSED:
            writer.transport.abort()
            return
        if isinstance(self.target, Path):
            back, forth = await asyncio.open_unix_connection(self.target)
        else:
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
        asking = asyncio.create_task(_pass_on(reader, forth))
        try:
            with suppress(ConnectionError):
                await self._answer(back, writer)
        finally:
            asking.cancel()
            forth.close()
            writer.close()
            await asyncio.gather(asking, return_exceptions=True)  # perhaps cancelled here

    async def _answer(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rng, n_passed = random.Random(0), 0
        while block := await back.read(_BLOCK_BYTES):
            left = max(0, self.after_bytes - n_passed)
            n_passed += len(block)
            match self.fault:
                case Fault.SILENT:
                    continue
                case Fault.LATE:
                    await asyncio.sleep(_LATE_S)
                case Fault.GARBAGE:
                    block = rng.randbytes(len(block))
                case Fault.GARBLED:
                    block = block[:left] + rng.randbytes(len(block[left:]))
                case Fault.CUT | Fault.CLOSED if n_passed > self.after_bytes:
                    writer.write(block[:left])
                    await writer.drain()
                    if self.fault is Fault.CUT:
                        writer.transport.abort()
                    return
                case Fault.DRIP:
                    writer.write(block[:left])
                    for byte in block[left:]:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(_DRIP_S)
                    continue
            writer.write(block)
            await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while block := await reader.read(_BLOCK_BYTES):
            writer.write(block)
            await writer.drain()
        writer.write_eof()


@asynccontextmanager
async def faulty_proxy(target: Path | int) -> AsyncIterator[FaultyProxy]:
    proxy = FaultyProxy(target=target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        try:
            yield proxy
        finally:
            server.close()
            await proxy.end()
