"""`/v1/batches`: OpenAI's batches of requests that are answered in the background.

Knows: requests and answers, which endpoints a line may name. Does not know: how lines are run.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.routing import APIRoute

from molmo_core.api_batches import Batch, BatchList, BatchRequest
from molmo_core.errors import InvalidRequest
from molmo_server.batches.service import Batches
from molmo_server.routes.body import read_body
from molmo_server.tenancy.callers import Errand, caller_of

_ENDPOINTS = frozenset(
    f"/v1/{name}"
    for name in (
        *("chat/completions", "completions", "responses"),
        *("point", "count", "track", "caption", "query"),
    )
)
_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}}},
}


def batches_router(batches: Batches) -> APIRouter:
    router = APIRouter(
        prefix="/v1/batches",
        tags=["batches"],
    )

    @router.post(
        "",
        operation_id="create_batch",
        summary="Answer the requests of a file in the background",
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def create(request: Request) -> Batch:
        asked = await read_body(request, BatchRequest, batches.settings, takes_forms=False)
        _check_endpoint(request.app, asked.endpoint)
        running = batches.running
        errand = Errand.of(caller_of(request.scope))
        batch = await asyncio.to_thread(running.jobs.create, errand, asked)
        running.runner.take(batch.id)
        return batch

    @router.get("", operation_id="batches", summary="Batches, newest first")
    async def listed(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> BatchList:
        tenant = caller_of(request.scope).tenant
        return await asyncio.to_thread(batches.running.jobs.page, tenant, limit=limit, after=after)

    @router.get("/{batch_id}", operation_id="batch", summary="How far a batch is")
    async def batch(batch_id: str, request: Request) -> Batch:
        tenant = caller_of(request.scope).tenant
        return await asyncio.to_thread(batches.running.jobs.get, tenant, batch_id)

    @router.post(
        "/{batch_id}/cancel",
        operation_id="cancel_batch",
        summary="Begin no more lines; what is answered is kept",
    )
    async def cancel(batch_id: str, request: Request) -> Batch:
        running, tenant = batches.running, caller_of(request.scope).tenant
        cancelled = await asyncio.to_thread(running.jobs.cancel, tenant, batch_id)
        running.runner.drop_lines(batch_id)
        return cancelled

    return router


def _check_endpoint(app: FastAPI, endpoint: str) -> None:
    served = {
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods
    }
    if endpoint not in _ENDPOINTS & served:
        allowed = ", ".join(sorted(_ENDPOINTS & served))
        raise InvalidRequest(
            f"got the endpoint {endpoint[:60]!r}; batches are taken for {allowed}",
            param="endpoint",
        )
