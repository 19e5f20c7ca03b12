"""The application: all wiring on one screen, no state outside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from molmo_core import __version__
from molmo_server.admission import Admission
from molmo_server.answers.verbs import VERBS
from molmo_server.checkpoints.configured import first_checkpoint, open_local, rollout_plan
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.following import StoreFollower
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_server.checkpoints.rollout import Rollout
from molmo_server.engine_pool import EnginePool
from molmo_server.engines import OwnEngines
from molmo_server.errors import install_error_handlers
from molmo_server.gateway import Gateway
from molmo_server.media.gate import MediaGate
from molmo_server.openai_api.chat_request import ChatRequest
from molmo_server.openai_api.completions_request import CompletionsRequest
from molmo_server.openai_api.responses_request import ResponsesRequest
from molmo_server.routes.admin import admin_router, usage_router
from molmo_server.routes.chat import chat_router
from molmo_server.routes.completions import completions_router
from molmo_server.routes.media import media_router
from molmo_server.routes.ops import ops_router
from molmo_server.routes.responses import responses_router
from molmo_server.routes.verbs import verbs_router
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Edge, Metrics
from molmo_server.tenancy.access import Access


def create_app(
    settings: MolmoSettings,
    engines: EnginePool,
    checkpoint: Checkpoint | None = None,
    *,
    own: OwnEngines | None = None,
    address: str = "",
) -> FastAPI:
    """Serve a checkpoint through `engines`, which start and stop with the application.

    `checkpoint` None: the settings' one. `own` makes engines whose processes are ours. `address`:
    where the service will be found, for a gate. Raises CheckpointError.
    """
    checkpoint = checkpoint or first_checkpoint(settings)
    live = LiveCheckpoint(current=checkpoint)
    store, local = open_local(settings)
    plan = rollout_plan(settings, address)
    rollout = Rollout(plan, live=live, engines=engines, store=store, local=local, own=own)
    follower = None
    if store is not None and local is not None:
        follower = StoreFollower(rollout, store, local, loads=settings.follows_store)
    metrics = Metrics()
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key else None
    access = Access(settings.keys, admin_key=admin_key)
    gateway = Gateway(
        settings=settings,
        live=live,
        engines=engines,
        media=MediaGate(settings, on_known=metrics.media_cache_hits.inc),
        admission=Admission(
            max_concurrent=settings.max_concurrent,
            max_queued=settings.max_queued,
            deadline_s=settings.deadline_s,
        ),
        metrics=metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with access.running(), _running(engines, gateway, follower, local):
            yield

    app = FastAPI(
        title="Molmo2",
        version=__version__,
        summary="Points, counts and tracks as typed data",
        lifespan=lifespan,
        dependencies=[Depends(access.check)],
    )
    install_error_handlers(app)
    for router in (
        chat_router(gateway),
        completions_router(gateway),
        responses_router(gateway),
        verbs_router(gateway),
        media_router(gateway),
        ops_router(gateway),
        admin_router(rollout),
        usage_router(access),
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


@asynccontextmanager
async def _running(
    engines: EnginePool,
    gateway: Gateway,
    follower: StoreFollower | None,
    local: LocalCheckpoints | None,
) -> AsyncIterator[None]:
    """Engines, and what goes on in the background, as long as the block."""
    await engines.start()
    following = follower.start() if follower else []
    gateway.media.spool.start()
    try:
        yield
    finally:
        gateway.media.spool.close()
        if local is not None:
            local.abandon()
        background = [*following, *gateway.shadows]
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await engines.stop(drain_s=gateway.settings.drain_s)


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, and the bodies that the routes read by themselves."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        models: list[type[BaseModel]] = [ChatRequest, CompletionsRequest, ResponsesRequest]
        models += [spec.request for spec in VERBS.values()]
        for model in models:
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= own.pop("$defs", {}) | {model.__name__: own}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]  # without one where no keys are asked for
        app.openapi_schema = document
    return app.openapi_schema
