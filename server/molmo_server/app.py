"""The application: all wiring on one screen, no state outside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Depends, FastAPI

from molmo_core import __version__
from molmo_server.admission import Admission
from molmo_server.batches.service import Batches
from molmo_server.checkpoints.configured import first_checkpoint, open_local, rollout_plan
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.following import StoreFollower
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.checkpoints.rollout import Rollout
from molmo_server.engine_pool import EnginePool
from molmo_server.engines import OwnEngines
from molmo_server.errors import install_error_handlers
from molmo_server.fleet import Fleet, ServedModel
from molmo_server.gateway import Gateway
from molmo_server.media.gate import MediaGate
from molmo_server.routes.admin import admin_router, usage_router
from molmo_server.routes.batches import batches_router
from molmo_server.routes.chat import chat_router
from molmo_server.routes.completions import completions_router
from molmo_server.routes.document import openapi_document
from molmo_server.routes.engines import engines_router
from molmo_server.routes.files import FILES, files_router, form_bytes
from molmo_server.routes.media import media_router
from molmo_server.routes.ops import ops_router
from molmo_server.routes.responses import responses_router
from molmo_server.routes.verbs import verbs_router
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Edge, Metrics, Tracing
from molmo_server.tenancy.access import Access
from molmo_server.web.headers import let_pages_ask


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What one more model is served from."""

    settings: MolmoSettings
    engines: EnginePool
    checkpoint: Checkpoint | None = None
    """None: the settings' one."""
    own: OwnEngines | None = None
    """Makes engines whose processes are ours."""


def create_app(
    settings: MolmoSettings,
    engines: EnginePool,
    checkpoint: Checkpoint | None = None,
    *,
    own: OwnEngines | None = None,
    others: Sequence[ModelParts] = (),
    address: str = "",
) -> FastAPI:
    """Serve a checkpoint through `engines`, which start and stop with the application.

    `checkpoint` None: the settings' one. `own` makes engines whose processes are ours. `others`:
    more models. `address`: where the service will be found, for a gate. Raises CheckpointError.
    """
    metrics, tracing = Metrics(), Tracing(settings.otlp_endpoint)
    shared = _Shared(
        media=MediaGate(
            settings, on_known=metrics.media_cache_hits.inc, on_look=metrics.media_looks.inc
        ),
        admission=Admission(
            max_concurrent=settings.max_concurrent,
            max_queued=settings.max_queued,
            deadline_s=settings.deadline_s,
        ),
        metrics=metrics,
        address=address,
    )
    more = [_assembled(parts, shared) for parts in others]
    parts = ModelParts(settings=settings, engines=engines, checkpoint=checkpoint, own=own)
    first = _assembled(parts, shared, others=tuple(model.gateway for model in more))
    gateway, models = first.gateway, [first, *more]
    fleet = Fleet(models)
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key else None
    access = Access(settings.keys, admin_key=admin_key, limits=settings.limits)

    batches = Batches(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with access.running(), _running(models), batches.open(app):
                yield
        finally:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Molmo2",
        version=__version__,
        summary="Points, counts and tracks as typed data",
        docs_url=None,  # a page of our own, see `ops`
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(access.check)],
    )
    app.state.is_leaving = False
    install_error_handlers(app)
    asking = (chat_router, completions_router, responses_router, verbs_router, media_router)
    for router in (
        *(router_of(gateway) for router_of in asking),
        files_router(batches),
        batches_router(batches),
        ops_router(gateway),
        admin_router(fleet),
        engines_router(fleet, gateway.admission, settings),
        usage_router(access),
    ):
        app.include_router(router)
    let_pages_ask(app, settings)
    app.add_middleware(
        Edge,
        metrics=metrics,
        tracing=tracing,
        current_checkpoint=lambda: gateway.checkpoint.id,
        max_body_bytes=settings.max_body_bytes,
        larger_bodies={FILES: form_bytes(settings.max_file_bytes)},
    )
    app.openapi = lambda: openapi_document(  # type: ignore[method-assign]
        app, asks_for_keys=settings.keys is not None
    )
    return app


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all models have in common."""

    media: MediaGate
    admission: Admission
    metrics: Metrics
    address: str


def _assembled(parts: ModelParts, shared: _Shared, others: tuple[Gateway, ...] = ()) -> ServedModel:
    settings, engines = parts.settings, parts.engines
    live = LiveCheckpoint(current=parts.checkpoint or first_checkpoint(settings))
    for engine in engines.engines:
        engine.checkpoint_id = engine.checkpoint_id or live.current.id
    store, local = open_local(settings)
    plan = rollout_plan(settings, shared.address)
    rollout = Rollout(plan, live=live, engines=engines, store=store, local=local, own=parts.own)
    rollout.history.on_event = shared.metrics.note_rollout
    follower = None
    if store is not None and local is not None:
        follower = StoreFollower(rollout, store, local, loads=settings.follows_store)
    gateway = Gateway(
        settings=settings,
        live=live,
        engines=engines,
        media=shared.media,
        admission=shared.admission,
        metrics=shared.metrics,
        others=others,
    )
    return ServedModel(gateway=gateway, rollout=rollout, follower=follower, local=local)


@asynccontextmanager
async def _running(models: Sequence[ServedModel]) -> AsyncIterator[None]:
    """Engines, and what goes on in the background, as long as the block."""
    background: list[asyncio.Task[None]] = []
    for model in models:
        await model.engines.start()
        background += model.follower.start() if model.follower else []
    spool, drain_s = models[0].gateway.media.spool, models[0].gateway.settings.drain_s
    spool.start()
    try:
        yield
    finally:
        spool.close()
        for model in models:
            if model.local is not None:
                model.local.abandon()
            background += model.gateway.shadows
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await asyncio.gather(*(model.engines.stop(drain_s=drain_s) for model in models))
