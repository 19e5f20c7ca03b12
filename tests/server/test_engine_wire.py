"""HTTP to an engine, byte for byte: every framing, every way to break, nothing left behind."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from molmo_server.engine_pool import wire
from molmo_server.engine_pool.answer import BrokenAnswer, LastBytes
from molmo_server.engine_pool.wire import EngineAddress, EngineClient
from tests.server.certificate import self_signed

Run = Callable[[Coroutine[Any, Any, None]], None]
Say = Callable[[asyncio.StreamWriter], Awaitable[None]]

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=x\r\n"
CHUNKED += b"transfer-encoding: chunked\r\n\r\n"
PIECES = b"3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\nx-trailer: 1\r\n\r\n"
LIMIT_S = 20


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """In the event loop of tests, and in that of `molmo serve`."""
    runner: Run = request.param
    return runner


@dataclass(kw_only=True)
class Engine:
    """Says the same to every request, as it was told."""

    says: list[bytes | Say]
    requests: list[bytes] = field(default_factory=list)
    n_connections: int = 0
    n_open: int = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        self.n_open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                n_bytes = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(n_bytes or 0)))
                for said in self.says:
                    if isinstance(said, bytes):
                        writer.write(said)
                        await writer.drain()
                    else:
                        await said(writer)
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.n_open -= 1
            writer.close()


@asynccontextmanager
async def asked(*says: bytes | Say, **options: Any) -> AsyncIterator[tuple[Engine, EngineClient]]:
    engine = Engine(says=list(says))
    server = await asyncio.start_server(engine.accept, "127.0.0.1", 0, ssl=options.get("tls"))
    port = server.sockets[0].getsockname()[1]
    scheme = "https" if "tls" in options else "http"
    host = "localhost" if "tls" in options else "127.0.0.1"
    address = EngineAddress(url=f"{scheme}://{host}:{port}")
    client = EngineClient(address, connect_timeout_s=5)
    async with asyncio.timeout(LIMIT_S):
        try:
            yield engine, client
        finally:
            client.close()
            server.close()
            await soon(lambda: engine.n_open == 0)


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def text_of(client: EngineClient) -> bytes:
    with closing(await client.post("/x", b"{}")) as answer:
        return await answer.rest()


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def test_what_is_sent(run: Run) -> None:
    async def work() -> None:
        async with asked(WHOLE) as (engine, client):
            noted = LastBytes()
            with closing(await client.post("/a", b"{1}", {"x-id": "7"}, noted=noted)) as answer:
                assert (answer.status, answer.content_type) == (200, "text/plain")
                assert await answer.rest() == b"hello"
                assert noted.at_s > 0
            with closing(await client.get("/b")) as answer:
                assert await answer.rest() == b"hello"
            host = f"host: {client._address.host}\r\n".encode()
            assert engine.requests == [
                b"POST /a HTTP/1.1\r\n" + host + b"content-type: application/json\r\n"
                b"content-length: 3\r\nx-id: 7\r\n\r\n{1}",
                b"GET /b HTTP/1.1\r\n" + host + b"\r\n",
            ]
            assert engine.n_connections == 1

    run(work())


FRAMINGS: list[tuple[list[bytes | Say], bytes, bool]] = [
    ([WHOLE], b"hello", True),
    ([WHOLE[:1], WHOLE[1:60], WHOLE[60:]], b"hello", True),
    ([CHUNKED, PIECES], b"abcde", True),
    ([CHUNKED + PIECES], b"abcde", True),
    ([CHUNKED, *(PIECES[k : k + 1] for k in range(len(PIECES)))], b"abcde", True),
    ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b"", True),
    ([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", True),
    ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\ncontent-length: 9\r\n\r\n" + WHOLE],
     b"hello", True),
    ([b"HTTP/1.1 200 OK\r\n\r\nhello", close], b"hello", False),
    ([b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello"], b"hello", False),
    ([WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), close], b"hello", False),
    ([WHOLE + b"more than was asked for"], b"hello", False),
    ([WHOLE + WHOLE], b"hello", False),
]  # fmt: skip


@pytest.mark.parametrize(("says", "text", "is_kept"), FRAMINGS)
def test_framings(run: Run, says: list[bytes | Say], text: bytes, is_kept: bool) -> None:
    async def work() -> None:
        async with asked(*says) as (engine, client):
            assert [await text_of(client) for _ in range(3)] == [text] * 3
            assert engine.n_connections == (1 if is_kept else 3)

    run(work())


BROKEN: list[list[bytes | Say]] = [
    [close],
    [cut],
    [WHOLE[:20], close],
    [WHOLE[:-1], close],
    [WHOLE[:-1], cut],
    [CHUNKED + PIECES[:-2], close],
    [CHUNKED + b"zz\r\n"],
    [b"\x00\xff" * 20],
    [b"220 mail.example.org ESMTP\r\n"],
    [b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
    [b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"],
    [b"HTTP/1.1 200 OK\r\nx: " + b"y" * 3_000_000],
    [CHUNKED + b"3;x=" + b"y" * 3_000_000],
    [CHUNKED + b"0\r\nx: " + b"y" * 3_000_000],
]


@pytest.mark.parametrize("says", BROKEN)
def test_what_breaks(run: Run, says: list[bytes | Say]) -> None:
    async def work() -> None:
        async with asked(*says) as (engine, client):
            for _ in range(2):
                with pytest.raises(BrokenAnswer):
                    await text_of(client)
            assert engine.n_connections == 2

    run(work())


def test_what_came_before_the_break_is_given(run: Run) -> None:
    async def work() -> None:
        async with asked(CHUNKED + b"3\r\nabc\r\n", cut) as (_, client):
            with closing(await client.post("/x", b"{}")) as answer:
                assert answer.content_type == "text/event-stream"
                assert await answer.more() == b"abc"
                with pytest.raises(BrokenAnswer):
                    await answer.more()

    run(work())


def test_no_one_there(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        nowhere = {
            EngineAddress(socket=tmp_path / "none.sock"): FileNotFoundError,
            EngineAddress(url="http://127.0.0.1:1"): ConnectionRefusedError,
            EngineAddress(url="http://no-such-host.invalid:1"): socket.gaierror,
        }
        for address, error in nowhere.items():
            with pytest.raises(error):
                await EngineClient(address, connect_timeout_s=5).get("/health")

    run(work())


def listen_and_take_nobody(stack: ExitStack, address: tuple[str, int]) -> None:
    """Who connects waits: the queue is full."""
    stack.enter_context(socket.create_server(address, backlog=0))
    for _ in range(4):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(address)


@pytest.mark.parametrize("is_there", [True, False])
def test_each_address_of_a_host_is_tried(
    run: Run, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    async def work(stack: ExitStack) -> None:
        async with asked(WHOLE) as (_, client):
            port = int(client._address.host.partition(":")[2])
            hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.1" if is_there else "127.0.0.4"]
            listen_and_take_nobody(stack, (hosts[0], port))

            loop = asyncio.get_running_loop()
            look_up = loop.getaddrinfo

            async def found(host: str, port: int, **how: Any) -> list[Any]:
                names = hosts if host == "engines.test" else [host]
                return [one for name in names for one in await look_up(name, port, **how)]

            monkeypatch.setattr(loop, "getaddrinfo", found)
            address = EngineAddress(url=f"http://engines.test:{port}")
            several = EngineClient(address, connect_timeout_s=5 if is_there else 0.5)
            with closing(several):
                if is_there:
                    assert await text_of(several) == b"hello"
                else:
                    with pytest.raises(TimeoutError):
                        await text_of(several)

    with ExitStack() as stack:
        run(work(stack))


def test_a_unix_socket(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        engine, path = Engine(says=[WHOLE]), tmp_path / "e.sock"
        async with await asyncio.start_unix_server(engine.accept, str(path)):
            client = EngineClient(EngineAddress(socket=path), connect_timeout_s=5)
            assert await text_of(client) == b"hello"
            assert b"\r\nhost: engine\r\n" in engine.requests[0]
            client.close()
            await soon(lambda: engine.n_open == 0)

    run(work())


def test_tls(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path, "localhost")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)

    async def work(is_trusted: bool) -> None:
        async with asked(CHUNKED, PIECES, tls=tls) as (engine, client):
            if not is_trusted:
                with pytest.raises(ssl.SSLCertVerificationError):
                    await text_of(client)
                return
            assert [await text_of(client) for _ in range(2)] == [b"abcde"] * 2
            assert engine.n_connections == 1

    run(work(is_trusted=False))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    run(work(is_trusted=True))


def test_a_handshake_that_is_not_answered(run: Run) -> None:
    async def work() -> None:
        has_gone = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            has_gone.set()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        address = EngineAddress(url=f"https://127.0.0.1:{port}")
        with pytest.raises(TimeoutError):
            await EngineClient(address, connect_timeout_s=0.1).get("/health")
        async with asyncio.timeout(LIMIT_S):
            await has_gone.wait()
        server.close()

    run(work())


async def until_gone(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"1\r\nx\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("head", [b"", CHUNKED])
def test_who_leaves_cuts_the_connection(run: Run, head: bytes) -> None:
    async def work() -> None:
        async with asked(head, until_gone) as (engine, client):
            waiting = asyncio.create_task(text_of(client))
            await soon(lambda: len(engine.requests) == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await soon(lambda: engine.n_open == 0)

    run(work())


def test_an_answer_that_is_not_read_to_its_end_cuts_it_too(run: Run) -> None:
    async def work() -> None:
        async with asked(CHUNKED + b"1\r\nx\r\n", until_gone) as (engine, client):
            with closing(await client.post("/x", b"{}")) as answer:
                assert await answer.more()
            await soon(lambda: engine.n_open == 0)

    run(work())


def test_giving_up_the_engine_breaks_answers_off(run: Run) -> None:
    async def work() -> None:
        async with asked(CHUNKED, until_gone) as (_, client):
            reading = asyncio.create_task(text_of(client))
            with closing(await client.post("/x", b"{}")) as answer:
                client.close()
                with pytest.raises(BrokenAnswer):
                    await answer.rest()
                with pytest.raises(BrokenAnswer):
                    await reading

    run(work())


def test_what_nobody_reads_stays_with_the_engine(run: Run) -> None:
    n_said = 0

    async def much(writer: asyncio.StreamWriter) -> None:
        nonlocal n_said
        for _ in range(64):
            writer.write(b"100000\r\n" + bytes(0x100000) + b"\r\n")
            await writer.drain()
            n_said += 1
        writer.write(b"0\r\n\r\n")

    async def work() -> None:
        async with asked(CHUNKED, much) as (_, client):
            with closing(await client.post("/x", b"{}")) as answer:
                before = -1
                while n_said > before:  # until it stands still
                    before = n_said
                    await asyncio.sleep(0.2)
                assert n_said < 32
                assert answer._n_unread_bytes < 2**20
                assert len(await answer.rest()) == 64 * 2**20

    run(work())


def test_idle_connections_are_closed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_IDLE_CONNECTION_S", 0.1)

    async def work() -> None:
        async with asked(WHOLE) as (engine, client):
            await asyncio.gather(*(text_of(client) for _ in range(3)))
            assert 1 <= engine.n_connections <= 3
            await soon(lambda: engine.n_open == 0)
            assert await text_of(client) == b"hello"

    run(work())


def test_a_kept_connection_that_was_closed_is_not_used(run: Run) -> None:
    async def work() -> None:
        async with asked(WHOLE, close) as (engine, client):
            assert await text_of(client) == b"hello"
            await soon(lambda: engine.n_open == 0)
            await asyncio.sleep(0)
            assert await text_of(client) == b"hello"

    run(work())


def test_pouring(run: Run) -> None:
    async def work() -> None:
        async with asked(CHUNKED, PIECES) as (_, client):
            with closing(await client.post("/x", b"{}")) as answer:
                got: list[bytes] = []
                assert await answer.pour(lambda data: got.append(data) is not None)
                while await answer.pour(lambda data: got.append(data) is not None):
                    pass
                assert b"".join(got) == b"abcde"
                assert answer.is_whole

    run(work())


def test_whoever_takes_may_fail(run: Run) -> None:
    got: list[bytes] = []

    def fail(data: bytes) -> bool:
        got.append(data)
        raise ValueError("unforeseen")

    async def slowly(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)  # it waits by then
        writer.write(PIECES)

    async def work() -> None:
        async with asked(CHUNKED, slowly) as (_, client):
            answer = await client.post("/x", b"{}")
            with closing(answer), pytest.raises(ValueError, match="unforeseen"):
                await answer.pour(fail)

    run(work())
    assert len(got) == 1


def test_after_a_failure_nothing_more_is_taken() -> None:
    """Several pieces may come before the task that waits is woken."""
    got: list[bytes] = []

    def fail(data: bytes) -> bool:
        got.append(data)
        raise ValueError("unforeseen")

    async def work() -> None:
        async with asked(CHUNKED) as (_, client):
            with closing(await client.post("/x", b"{}")) as answer:
                pouring = asyncio.create_task(answer.pour(fail))
                await asyncio.sleep(0)
                answer.feed(PIECES[:8])
                answer.feed(PIECES[8:])
                with pytest.raises(ValueError, match="unforeseen"):
                    await pouring

    asyncio.run(work())
    assert got == [b"abc"]
