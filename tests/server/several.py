"""A gateway in front of several scripted engines, on Unix sockets or ports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from aiohttp import web

from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
from molmo_server.engine_pool.fake import FakeEngine
from molmo_server.settings import MolmoSettings
from tests.support.gateway import FAST, run_fake, serve_in_thread, until

KEY = "secret"
ADMIN = {"authorization": f"Bearer {KEY}"}


@dataclass(kw_only=True)
class Several:
    http: httpx2.Client
    pool: EnginePool
    fakes: list[FakeEngine]

    def ask(self, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": "shapes"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def answering(self, **fields: Any) -> str:
        """The checkpoint of an answer; header and body agree."""
        response = self.ask(**fields)
        assert response.status_code == 200, response.text
        answered: str = response.json()["system_fingerprint"]
        assert response.headers["x-molmo-checkpoint"] == answered
        return answered

    def activate(self, checkpoint_id: str) -> httpx2.Response:
        return self.http.post(f"/admin/checkpoints/{checkpoint_id}/activate", headers=ADMIN)

    def admin(self, method: str, path: str = "", **fields: Any) -> httpx2.Response:
        return self.http.request(method, f"/admin/engines{path}", headers=ADMIN, **fields)

    def state_of(self, name: str) -> str:
        rows = self.admin("GET").json()["engines"]
        found: list[str] = [row["state"] for row in rows if row["name"] == name]
        return found[0] if found else "unknown"


@contextmanager
def several(folder: Path, n: int = 2, **fields: Any) -> Iterator[Several]:
    """Engines are named engine-0, engine-1, …; their sockets lie in `folder`."""
    fakes = [FakeEngine() for _ in range(n)]
    settings = MolmoSettings(**{"admin_key": KEY, "drain_s": 0.5, "deadline_s": 20, **fields})
    pools: list[EnginePool] = []

    def pool() -> EnginePool:
        engines = [
            RemoteEngine(
                name=f"engine-{k}",
                address=EngineAddress(socket=folder / f"engine-{k}.sock"),
                timing=FAST,
            )
            for k in range(n)
        ]
        pools.append(EnginePool(engines))
        return pools[0]

    with ExitStack() as stack:
        for k, fake in enumerate(fakes):
            stack.enter_context(run_fake(fake, folder / f"engine-{k}.sock"))
        url = stack.enter_context(serve_in_thread(settings, pool))
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        until(lambda: all(engine.ready.is_set() for engine in pools[0].engines))
        yield Several(http=http, pool=pools[0], fakes=fakes)


@contextmanager
def fake_at_port(engine: FakeEngine) -> Iterator[str]:
    """The scripted engine at a URL, in a thread of its own."""
    loop = asyncio.new_event_loop()
    ended, is_up = asyncio.Event(), threading.Event()
    urls: list[str] = []

    async def serve() -> None:
        runner = web.AppRunner(engine.app(), shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        is_up.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert is_up.wait(10)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(timeout=30)
        loop.close()
