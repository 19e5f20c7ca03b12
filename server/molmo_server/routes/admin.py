"""`/admin/checkpoints`: what is served, what was tried, serve another, go back.

Knows: the admin key. Does not know: how a checkpoint comes to be served (`rollout`).
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header

from molmo_core import api
from molmo_core.errors import Unauthorised
from molmo_server.checkpoints.rollout import Rollout


def admin_router(rollout: Rollout, key: str | None) -> APIRouter:
    """Routes that ask for `Authorization: Bearer <key>`; without a key they are closed."""

    def check_key(authorization: Annotated[str, Header()] = "") -> None:
        if key is None:
            raise Unauthorised(
                "the routes under /admin are closed: start the server with MOLMO_ADMIN_KEY set"
            )
        given = authorization.removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Unauthorised("the admin key is missing or wrong: send Authorization: Bearer KEY")

    router = APIRouter(
        prefix="/admin/checkpoints",
        tags=["admin"],
        dependencies=[Depends(check_key)],
        responses={"4XX": {"model": api.ErrorEnvelope}, "5XX": {"model": api.ErrorEnvelope}},
    )

    @router.get("", operation_id="checkpoints", summary="What is served, stored and was tried")
    async def checkpoints() -> dict[str, Any]:
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
    async def activate(checkpoint_id: str) -> dict[str, Any]:
        return asdict(await rollout.activate(checkpoint_id))

    @router.post("/rollback", operation_id="rollback", summary="Serve what was served before")
    async def roll_back() -> dict[str, Any]:
        return asdict(await rollout.roll_back())

    return router
