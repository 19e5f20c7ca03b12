"""`/admin/checkpoints`: what is served, what was tried, serve another, go back; `/admin/usage`.

Knows: what operators ask for. Does not know: who may ask (`tenancy.access`), how a checkpoint
comes to be served (`rollout`).
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from molmo_server.fleet import Fleet
from molmo_server.tenancy.access import Access

Model = Annotated[str | None, Query(max_length=100)]


def usage_router(access: Access) -> APIRouter:
    router = APIRouter(tags=["admin"])

    @router.get("/admin/usage", operation_id="usage", summary="What each key used, day by day")
    async def usage(days: Annotated[int, Query(ge=1, le=3660)] = 30) -> dict[str, Any]:
        """`days`: so many with today; a day is one of UTC."""
        return {"usage": [row._asdict() for row in await access.usage(n_days=days)]}

    return router


def admin_router(fleet: Fleet) -> APIRouter:
    """`model` says which of several models is meant; the first unless given."""
    router = APIRouter(prefix="/admin/checkpoints", tags=["admin"])

    @router.get("", operation_id="checkpoints", summary="What is served, stored and was tried")
    async def checkpoints(model: Model = None) -> dict[str, Any]:
        rollout = fleet.model(model).rollout
        live = rollout.live
        return {
            "current": live.current.id,
            "previous": live.previous.id if live.previous else None,
            "is_loading": rollout.is_loading,
            "checkpoints": await asyncio.to_thread(rollout.states),
            "history": [asdict(event) for event in rollout.history.events],
        }

    @router.post(
        "/{checkpoint_id}/activate", operation_id="activate", summary="Serve this checkpoint"
    )
    async def activate(checkpoint_id: str, model: Model = None) -> dict[str, Any]:
        return asdict(await fleet.model(model).rollout.activate(checkpoint_id))

    @router.post("/rollback", operation_id="rollback", summary="Serve what was served before")
    async def roll_back(model: Model = None) -> dict[str, Any]:
        return asdict(await fleet.model(model).rollout.roll_back())

    return router
