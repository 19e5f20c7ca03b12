"""`/admin/engines`: which engines there are; more, fewer, drained or started again.

Knows: what operators and autoscalers ask for. Does not know: who may ask (`tenancy.access`), how
engines are run (`fleet`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from molmo_core.api_requests import StrictRequest
from molmo_server.admission import Admission
from molmo_server.fleet import Fleet
from molmo_server.routes.body import read_body
from molmo_server.settings import MolmoSettings

_LONGEST_DRAIN_S = 3600

DrainS = Annotated[float | None, Query(ge=0, le=_LONGEST_DRAIN_S)]


class NewEngine(StrictRequest):
    url: str = Field(max_length=300)
    """As http://10.0.0.5:8001."""
    model: str | None = Field(default=None, max_length=100)
    """Which of several models it has; the first unless given."""


_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": NewEngine.model_json_schema()}},
}


def engines_router(fleet: Fleet, admission: Admission, settings: MolmoSettings) -> APIRouter:
    router = APIRouter(prefix="/admin/engines", tags=["admin"])

    def patience_s(given: float | None) -> float:
        """For requests in flight."""
        return settings.drain_s if given is None else given

    @router.get("", operation_id="engines", summary="All engines, and what an autoscaler goes by")
    async def engines() -> dict[str, Any]:
        return {
            "queued": admission.n_queued,
            "running": admission.n_running,
            "ready": fleet.n_ready,
            "engines": [asdict(report) for report in fleet.reports()],
        }

    @router.post(
        "",
        operation_id="register_engine",
        summary="Ask one more engine, by its URL",
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def register(request: Request) -> dict[str, Any]:
        new = await read_body(request, NewEngine, settings, takes_forms=False)
        return asdict(await fleet.register(new.url, new.model))

    @router.delete("/{name}", operation_id="remove_engine", summary="Drain an engine and forget it")
    async def remove(name: str, drain_s: DrainS = None) -> dict[str, Any]:
        return asdict(await fleet.deregister(name, drain_s=patience_s(drain_s)))

    @router.post(
        "/{name}/drain", operation_id="drain_engine", summary="Give an engine no more requests"
    )
    async def drain(name: str, drain_s: DrainS = None) -> dict[str, Any]:
        return asdict(await fleet.drain(name, drain_s=patience_s(drain_s)))

    @router.post(
        "/{name}/restart", operation_id="restart_engine", summary="Drain an engine and start it"
    )
    async def restart(name: str, drain_s: DrainS = None) -> dict[str, Any]:
        return asdict(await fleet.restart(name, drain_s=patience_s(drain_s)))

    return router
