"""A relay that does nothing else: what a web server and a client in Python cost by themselves.

Run: python -m tests.bench.bare PORT ENGINE_URL
"""

from __future__ import annotations

import sys

import aiohttp
import uvicorn
from starlette.types import Receive, Scope, Send


class Relay:
    def __init__(self, engine_url: str) -> None:
        self._url = engine_url
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, has_more = b"", True
        while has_more:
            message = await receive()
            body += message["body"]
            has_more = message["more_body"]
        self._session = self._session or aiohttp.ClientSession(auto_decompress=False)
        headers = {"content-type": "application/json"}
        url = f"{self._url}{scope['path']}"
        async with self._session.post(url, data=body, headers=headers) as response:
            kind = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            while chunk := await response.content.readany():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    relay = Relay(sys.argv[2])
    uvicorn.run(relay, port=int(sys.argv[1]), lifespan="off", log_config=None, access_log=False)
