"""The application: all wiring on one screen, no state outside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from molmo_core import __version__
from molmo_core.checkpoint_store import CheckpointStore
from molmo_server.admission import Admission
from molmo_server.chat_request import ChatRequest
from molmo_server.checkpoints.folder import Checkpoint, read_checkpoint
from molmo_server.checkpoints.rollout import LiveCheckpoint, Rollout
from molmo_server.engine_pool import EnginePool, EngineProcess
from molmo_server.engine_pool.swap import SwapLimits
from molmo_server.errors import install_error_handlers
from molmo_server.gateway import Gateway
from molmo_server.grounding import VERBS
from molmo_server.media import MediaGate
from molmo_server.routes.admin import admin_router
from molmo_server.routes.chat import chat_router
from molmo_server.routes.ops import ops_router
from molmo_server.routes.verbs import verbs_router
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Edge, Metrics


def create_app(
    settings: MolmoSettings,
    engines: EnginePool,
    checkpoint: Checkpoint | None = None,
    *,
    process_of: Callable[[Checkpoint], EngineProcess] | None = None,
) -> FastAPI:
    """Serve a checkpoint through `engines`, which start and stop with the application.

    `checkpoint` None: the settings' one. `process_of` tells how an engine of ours starts on another
    one. Raises CheckpointError.
    """
    checkpoint = checkpoint or read_checkpoint(
        settings.checkpoint_folder, max_model_len=settings.max_model_len
    )
    live = LiveCheckpoint(current=checkpoint)
    rollout = Rollout(
        live=live,
        engines=engines,
        store=None if settings.store is None else CheckpointStore(settings.store),
        process_of=process_of,
        served_name=settings.served_name,
        max_model_len=settings.max_model_len,
        limits=SwapLimits(
            drain_s=settings.swap_drain_s,
            load_s=settings.swap_load_s,
            tolerance=settings.probe_tolerance,
        ),
        follows=settings.follows_store,
    )
    metrics = Metrics()
    gateway = Gateway(
        settings=settings,
        live=live,
        engines=engines,
        media=MediaGate(settings, checkpoint.video),
        admission=Admission(
            max_concurrent=settings.max_concurrent,
            max_queued=settings.max_queued,
            deadline_s=settings.deadline_s,
        ),
        metrics=metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engines.start()
        watching = rollout.start_watching()
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await engines.stop(drain_s=settings.drain_s)

    app = FastAPI(
        title="Molmo2",
        version=__version__,
        summary="Points, counts and tracks as typed data",
        lifespan=lifespan,
    )
    install_error_handlers(app)
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key else None
    for router in (
        chat_router(gateway),
        verbs_router(gateway),
        ops_router(gateway),
        admin_router(rollout, admin_key),
    ):
        app.include_router(router)
    app.add_middleware(
        Edge,
        metrics=metrics,
        current_checkpoint=lambda: live.current.id,
        max_body_bytes=settings.max_body_bytes,
    )
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, and the bodies that the routes read by themselves."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        models: list[type[BaseModel]] = [ChatRequest, *(spec.request for spec in VERBS.values())]
        for model in models:
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= own.pop("$defs", {}) | {model.__name__: own}
        app.openapi_schema = document
    return app.openapi_schema
