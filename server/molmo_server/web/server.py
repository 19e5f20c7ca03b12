"""uvicorn's configuration, the same for `molmo serve` and for tests.

Knows: uvicorn's options. Does not know: the application, signals (`serve`).
"""

from __future__ import annotations

import asyncio

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from molmo_server.settings import MolmoSettings
from molmo_server.web.connections import ConnectionLimits, guarded_protocol


def server_config(app: FastAPI, settings: MolmoSettings) -> uvicorn.Config:
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        head_timeout_s=settings.head_timeout_s,
        write_timeout_s=settings.write_timeout_s,
    )

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            # At the end, by uvicorn, which takes it for a failure of the application. The caller
            # has been told (`telemetry.edge`).
            if scope["type"] != "http":
                raise

    return uvicorn.Config(
        answering,
        http=guarded_protocol(limits),
        ws="none",
        log_config=None,
        access_log=False,  # the Edge writes one line a request
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type] # seconds, also parts
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
