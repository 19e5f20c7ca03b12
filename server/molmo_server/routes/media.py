"""`/v1/media`: upload a picture or video once, ask about it often.

Knows: bodies and answers. Does not know: how files are checked and kept (`media`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from molmo_core import api
from molmo_server.gateway import Gateway
from molmo_server.routes.body import read_file
from molmo_server.tenancy.callers import caller_of

_FILE = {"type": "string", "format": "binary"}
_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": _FILE},
                "required": ["file"],
                "additionalProperties": False,
            }
        },
        "image/*": {"schema": _FILE},
        "video/*": {"schema": _FILE},
    },
}


def media_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix="/v1/media", tags=["media"])

    @router.post(
        "",
        operation_id="upload",
        summary="Check a picture or video and keep it for a while",
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def upload(request: Request) -> api.UploadedMedia:
        data = await read_file(request, gateway.settings)
        owner = caller_of(request.scope).tenant
        async with gateway.admission.admit(owner):
            kept = await gateway.media.keep(data, owner=owner)
        gateway.metrics.uploads.inc()
        gateway.metrics.upload_bytes.inc(kept.bytes)
        return kept

    @router.get("/{media_id}", operation_id="media", summary="What an uploaded file is")
    async def facts(media_id: str, request: Request) -> api.UploadedMedia:
        owner = caller_of(request.scope).tenant
        async with gateway.admission.admit(owner):
            return await gateway.media.facts(media_id, owner=owner)

    @router.delete("/{media_id}", operation_id="delete_media", summary="Remove an uploaded file")
    async def delete(media_id: str, request: Request) -> api.DeletedMedia:
        gateway.media.spool.delete(media_id, caller_of(request.scope).tenant)
        return api.DeletedMedia(id=media_id)

    return router
