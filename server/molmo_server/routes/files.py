"""`/v1/files`: OpenAI's files, for batches.

Knows: forms, answers. Does not know: how files are kept (`batches`).
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from molmo_core.api_batches import DeletedFile, ExpiresAfter, File, FileList, FilePurpose
from molmo_core.api_requests import StrictRequest
from molmo_core.errors import InvalidRequest, UnknownField
from molmo_server.batches.service import Batches
from molmo_server.batches.upload import Upload, receive_file
from molmo_server.errors import parse_fields, refusal
from molmo_server.routes.body import content_type, in_time
from molmo_server.tenancy.callers import caller_of

FILES = "/v1/files"
_FORM_SLACK_BYTES = 64 * 1024
_MAX_LISTED = 10_000
_EXPIRES = ("expires_after[anchor]", "expires_after[seconds]")
_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                    "expires_after[seconds]": {"type": "integer"},
                },
                "required": ["file", "purpose"],
            }
        }
    },
}


class _FileFields(StrictRequest):
    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


def form_bytes(max_file_bytes: int) -> int:
    """A form with the largest file."""
    return max_file_bytes + _FORM_SLACK_BYTES


def files_router(batches: Batches) -> APIRouter:
    router = APIRouter(
        prefix=FILES,
        tags=["batches"],
    )

    @router.post(
        "",
        operation_id="create_file",
        summary="Keep a file of requests, one JSON object a line",
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def create(request: Request) -> File:
        return await _create(batches, request)

    @router.get("", operation_id="files", summary="Files, newest first")
    async def files(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: FilePurpose | None = None,
    ) -> FileList:
        return await asyncio.to_thread(
            batches.running.files.page,
            caller_of(request.scope).tenant,
            limit=limit,
            after=after,
            order=order,
            purpose=purpose,
        )

    @router.get("/{file_id}", operation_id="file", summary="What is known of a file")
    async def file(file_id: str, request: Request) -> File:
        tenant = caller_of(request.scope).tenant
        return await asyncio.to_thread(batches.running.files.get, tenant, file_id)

    @router.get(
        "/{file_id}/content",
        operation_id="file_content",
        summary="A file as it is",
        response_class=FileResponse,
    )
    async def content(file_id: str, request: Request) -> FileResponse:
        tenant = caller_of(request.scope).tenant
        path = await asyncio.to_thread(batches.running.files.path, tenant, file_id)
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=f"{path.name}.jsonl",  # never the caller's name in a header
        )

    @router.delete("/{file_id}", operation_id="delete_file", summary="Remove a file")
    async def delete(file_id: str, request: Request) -> DeletedFile:
        tenant = caller_of(request.scope).tenant
        await asyncio.to_thread(batches.running.files.delete, tenant, file_id)
        return DeletedFile(id=file_id)

    return router


async def _create(batches: Batches, request: Request) -> File:
    kind, settings = content_type(request), batches.settings
    if kind != "multipart/form-data":
        raise refusal(415, f"got the content-type {kind[:60]!r}; send multipart/form-data")
    running, tenant = batches.running, caller_of(request.scope).tenant
    left_bytes = await asyncio.to_thread(running.files.check_room, tenant)
    # The slowest sender that is waited for is as slow here as elsewhere.
    pace = max(1.0, settings.max_file_bytes / settings.max_body_bytes)
    with running.folder.part() as part:
        async with in_time(settings.body_timeout_s * pace):
            upload = await receive_file(
                request.stream(),
                request.headers["content-type"],
                part,
                max_bytes=min(settings.max_file_bytes, left_bytes),
            )
        ttl_s = _check(upload)
        assert upload.filename is not None
        return await asyncio.to_thread(
            running.files.add, part, tenant=tenant, filename=upload.filename, ttl_s=ttl_s
        )


def _check(upload: Upload) -> float | None:
    """Seconds that the file is wanted for, if the form says; raises InvalidRequest."""
    if upload.filename is None:
        raise InvalidRequest("the form has no file; send one in the field 'file'", param="file")
    fields: dict[str, Any] = dict(upload.fields)
    anchor, seconds = (fields.pop(name, None) for name in _EXPIRES)
    if anchor is not None or seconds is not None:
        given = {"anchor": anchor, "seconds": seconds}
        fields["expires_after"] = {k: v for k, v in given.items() if v is not None}
    if fields.get("purpose") not in ("batch", None):
        raise InvalidRequest(
            f"got the purpose {fields['purpose'][:60]!r}; files are kept for batches: send 'batch'",
            param="purpose",
        )
    if unknown := fields.keys() - {"purpose", "expires_after"}:
        raise UnknownField(f"got the unknown field {min(unknown)[:60]!r}; leave it out")
    wish = parse_fields(fields, _FileFields, is_strict=False).expires_after
    return None if wish is None else wish.seconds
