"""Models, liveness, readiness, metrics and the page of documents.

Knows: what operators and OpenAI's clients ask for. Does not know: how engines are run.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from molmo_core import api
from molmo_core.errors import EngineUnavailable
from molmo_server.gateway import Gateway
from molmo_server.routes.document import PLAIN_TEXT
from molmo_server.telemetry.engine_metrics import merged
from molmo_server.web.docs_page import docs_page
from molmo_server.web.headers import DOCS


def ops_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["service"])
    created = int(time.time())
    every = (gateway, *gateway.others)

    def card(of: Gateway) -> api.ModelCard:
        return api.ModelCard(
            id=of.settings.served_name,
            created=created,
            checkpoint=of.checkpoint.id,
            max_model_len=of.checkpoint.max_model_len,
        )

    @router.get("/v1/models", operation_id="models", summary="The models served here")
    async def models() -> api.ModelList:
        return api.ModelList(data=[card(one) for one in every])

    @router.get("/v1/models/{model}", operation_id="model", summary="One model by its name")
    async def model(model: str) -> api.ModelCard:
        return card(gateway.serving(model))

    @router.get("/health", operation_id="health", summary="The service lives")
    async def health() -> dict[str, str]:
        return {"status": "ok", "checkpoint": gateway.checkpoint.id}

    @router.get(
        "/ready",
        operation_id="ready",
        summary="An engine takes requests; 503 with the reason otherwise",
    )
    async def ready(request: Request) -> dict[str, str]:
        if request.app.state.is_leaving:
            raise EngineUnavailable(
                "this server is ending; send the request to another", retry_after_s=1
            )
        if not any(one.engines.is_ready for one in every):
            raise gateway.engines.unavailable()
        return {"status": "ready", "checkpoint": gateway.checkpoint.id}

    @router.get("/metrics", operation_id="metrics", response_class=Response, responses=PLAIN_TEXT)
    async def metrics() -> Response:
        """Of the gateway and of its engines; the engines' have the label `gateway_engine`."""
        engines = [engine for one in every for engine in one.engines.all_engines]
        texts = await asyncio.gather(*(engine.metrics() for engine in engines))
        names = [engine.name for engine in engines]
        text = _gateway_metrics(gateway) + merged(dict(zip(names, texts, strict=True))).encode()
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @lru_cache(maxsize=1)
    def page(app: FastAPI) -> str:
        return docs_page(app.openapi())

    @router.get(DOCS, include_in_schema=False, response_class=HTMLResponse)
    async def docs(request: Request) -> str:
        return page(request.app)

    return router


def _gateway_metrics(gateway: Gateway) -> bytes:
    metrics = gateway.metrics
    metrics.running.set(gateway.admission.n_running)
    metrics.queued.set(gateway.admission.n_queued)
    metrics.media_bytes.set(gateway.media.spool.n_bytes)
    every = (gateway, *gateway.others)
    metrics.checkpoint.clear()
    for one in every:
        metrics.checkpoint.labels(one.checkpoint.id).set(1)
    metrics.show_engines(engine for one in every for engine in one.engines.all_engines)
    return metrics.text()
