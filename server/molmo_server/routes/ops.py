"""Models, liveness, readiness and metrics.

Knows: what operators and OpenAI's clients ask for. Does not know: how engines are run.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from molmo_core import api
from molmo_core.errors import ModelNotFound
from molmo_server.gateway import Gateway


def ops_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["service"])
    created = int(time.time())

    def card() -> api.ModelCard:
        return api.ModelCard(
            id=gateway.settings.served_name,
            created=created,
            checkpoint=gateway.checkpoint.id,
            max_model_len=gateway.checkpoint.max_model_len,
        )

    @router.get("/v1/models", operation_id="models", summary="The model served here")
    async def models() -> api.ModelList:
        return api.ModelList(data=[card()])

    @router.get("/v1/models/{model}", operation_id="model", summary="One model by its name")
    async def model(model: str) -> api.ModelCard:
        served = card()
        if model not in (served.id, served.checkpoint):
            raise ModelNotFound(
                f"there is no model {model[:100]!r}; served is {served.id}", param="model"
            )
        return served

    @router.get("/health", operation_id="health", summary="The service lives")
    async def health() -> dict[str, str]:
        return {"status": "ok", "checkpoint": gateway.checkpoint.id}

    @router.get(
        "/ready",
        operation_id="ready",
        summary="An engine takes requests; 503 with the reason otherwise",
        responses={503: {"model": api.ErrorEnvelope}},
    )
    async def ready() -> dict[str, str]:
        if not gateway.engines.is_ready:
            raise gateway.engines.unavailable()
        return {"status": "ready", "checkpoint": gateway.checkpoint.id}

    @router.get("/metrics", operation_id="metrics", response_class=Response)
    async def metrics() -> Response:
        """Of the gateway, and the engine's own when there is one engine."""
        text = _gateway_metrics(gateway)
        if len(gateway.engines.engines) == 1:
            text += _vllm_families(await gateway.engines.engines[0].metrics()).encode()
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


def _gateway_metrics(gateway: Gateway) -> bytes:
    metrics = gateway.metrics
    metrics.running.set(gateway.admission.n_running)
    metrics.queued.set(gateway.admission.n_queued)
    metrics.media_bytes.set(gateway.media.spool.n_bytes)
    metrics.checkpoint.clear()
    metrics.checkpoint.labels(gateway.checkpoint.id).set(1)
    for engine in gateway.engines.engines:
        metrics.engine_ready.labels(engine.name).set(engine.ready.is_set())
        metrics.engine_restarts.labels(engine.name).set(engine.n_restarts)
    return metrics.text()


def _vllm_families(text: str) -> str:
    """Only vLLM's own: the engine's process figures would stand there as the gateway's."""
    prefixes = ("vllm:", "# HELP vllm:", "# TYPE vllm:")
    return "".join(f"{line}\n" for line in text.splitlines() if line.startswith(prefixes))
