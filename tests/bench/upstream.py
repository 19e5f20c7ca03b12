"""An engine that costs next to nothing: every answer is the same stream, at a steady pace.

Run: python -m tests.bench.upstream PORT. Answers `POST /v1/chat/completions` with 64 events 3 ms
apart, or in one piece when no stream is asked for, and everything else with an empty 200.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
import orjson
import uvloop

N_CHUNKS = 64
PAUSE_S = 0.003
_IDENTITY = {"id": "chatcmpl-bench", "created": 1_700_000_000, "model": "molmo2"}


def _event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"object": "chat.completion.chunk", **_IDENTITY, "choices": [choice]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _in_chunks(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_PIECES = [
    _event({"role": "assistant", "content": ""}),
    *(_event({"content": f" {k:03d}"}) for k in range(N_CHUNKS - 2)),
    _event({}, "stop"),
]
_USAGE = {"prompt_tokens": 900, "completion_tokens": N_CHUNKS - 2, "total_tokens": 962}
_TOLD = {"object": "chat.completion.chunk", **_IDENTITY, "choices": [], "usage": _USAGE}
_USAGE_EVENT = b"data: " + orjson.dumps(_TOLD) + b"\n\n"
_DONE = b"data: [DONE]\n\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_MESSAGE = {"role": "assistant", "content": "A red circle."}
_WHOLE = orjson.dumps(
    {
        "object": "chat.completion",
        **_IDENTITY,
        "choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
)


class _Connection(asyncio.Protocol):
    """One caller; requests come one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()
        self._streaming: asyncio.Task[None] | None = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, bytearray()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        is_chat = self._url.endswith(b"/v1/chat/completions")
        asked = bytes(self._body).replace(b" ", b"")
        if is_chat and b'"stream":true' in asked:
            self._streaming = asyncio.create_task(self._stream(asked))
        else:
            body = _WHOLE if is_chat else b""
            kind = b"application/json" if is_chat else b"text/plain"
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b"
                % (kind, len(body), body)
            )

    async def _stream(self, body: bytes) -> None:
        self._transport.write(_STREAM_HEAD)
        due = asyncio.get_running_loop().time()
        for piece in _PIECES:
            self._transport.write(_in_chunks(piece))
            due += PAUSE_S
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        last = (_USAGE_EVENT if b'"include_usage":true' in body else b"") + _DONE
        self._transport.write(_in_chunks(last) + b"0\r\n\r\n")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
