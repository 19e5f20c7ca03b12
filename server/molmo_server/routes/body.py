"""The body of a request: JSON with URLs of media, a form with files, or one file alone.

A form has files in `image` (repeatable) or `video`, and the other fields by their names. Other
content types are refused, which also keeps foreign web pages out: a browser asks before it sends
JSON elsewhere. Reading ends after a time, however slowly a caller sends.

Knows: content types, forms. Does not know: what the fields mean.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile

from molmo_core.errors import InvalidMedia, InvalidRequest, UnknownField
from molmo_server.errors import parse_fields, parse_json, refusal
from molmo_server.settings import MolmoSettings

Model = TypeVar("Model", bound=BaseModel)

_FILE_FIELDS = {"image": "image/png", "video": "video/mp4"}
"""Media type by field: the kind is what matters, the content is looked at later."""
_JSON_FIELDS = ("objects", "region", "points", "media_options")
"""Fields of a form whose text is JSON."""
_MAX_FORM_FIELDS = 32
_MAX_FIELD_BYTES = 1024 * 1024


async def read_body(
    request: Request, model: type[Model], settings: MolmoSettings, *, takes_forms: bool = True
) -> Model:
    """Raises InvalidRequest (also with status 408 and 415), UnknownField, InvalidMedia."""
    kind = content_type(request)
    async with in_time(settings.body_timeout_s):
        if kind == "application/json" or kind.endswith("+json"):
            return parse_json(await request.body(), model)
        if takes_forms and kind == "multipart/form-data":
            fields = await _read_form(request, settings)
            return parse_fields(fields, model, is_strict=False)
    allowed = "application/json" + (" or multipart/form-data" if takes_forms else "")
    raise refusal(415, f"got the content-type {kind[:60]!r}; send {allowed}")


async def read_file(request: Request, settings: MolmoSettings) -> bytes:
    """The body as it is, or the file in a form's field `file`; its name is not looked at.

    Raises InvalidRequest (also with status 408 and 415).
    """
    kind = content_type(request)
    async with in_time(settings.body_timeout_s):
        if kind.startswith(("image/", "video/")):
            return await request.body()
        if kind == "multipart/form-data":
            # More than allowed, so that what is too much can be named.
            async with request.form(max_files=2, max_fields=2) as form:
                fields = form.multi_items()
                if [name for name, _ in fields] == ["file"] and isinstance(
                    file := fields[0][1], UploadFile
                ):
                    return await file.read()
                got = ", ".join(repr(name[:60]) for name, _ in fields) or "none"
                raise InvalidRequest(
                    f"the form has the fields {got}; send one file, in a field named 'file'",
                    param="file",
                )
    raise refusal(
        415, f"got the content-type {kind[:60]!r}; send image/*, video/* or multipart/form-data"
    )


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def in_time(limit_s: float) -> AsyncIterator[None]:
    """For reading a body; raises InvalidRequest with status 408."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        limit = f"{limit_s:g} s"
        raise refusal(408, f"the body was not complete after {limit}; send it faster") from error


async def _read_form(request: Request, settings: MolmoSettings) -> dict[str, Any]:
    form = await request.form(
        # More than allowed, so that what is too much can be counted and named.
        max_files=2 * settings.max_images + 2,
        max_fields=_MAX_FORM_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        return await _fields_of(form, settings)
    finally:
        await form.close()


async def _fields_of(form: FormData, settings: MolmoSettings) -> dict[str, Any]:
    """The form as the JSON request would be: files become data URLs."""
    fields: dict[str, Any] = {}
    images: list[str] = []
    for name, value in form.multi_items():
        if isinstance(value, str):
            if name in _FILE_FIELDS:
                raise InvalidMedia(f"the field {name!r} holds text; send a file in it", param=name)
            if name in fields:
                raise InvalidRequest(f"the field {name!r} is there twice; send one", param=name)
            fields[name] = _json(name, value) if name in _JSON_FIELDS else value
        elif name == "image":
            images.append(await _data_url(value, name, settings.max_image_bytes))
        elif name == "video" and "video_url" not in fields:
            fields["video_url"] = await _data_url(value, name, settings.max_video_bytes)
        elif name == "video":
            raise InvalidRequest("the field 'video' is there twice; send one", param=name)
        else:
            raise UnknownField(
                f"got a file in the field {name[:60]!r}; send files as 'image' or 'video'",
                param=name[:60],
            )
    return fields | ({"images": images} if images else {})


def _json(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the field {name!r} is not JSON ({error}); write it as in a JSON request", param=name
        ) from error


async def _data_url(file: UploadFile, name: str, limit: int) -> str:
    if file.size is not None and file.size > limit:
        raise InvalidMedia(
            f"the file in {name!r} has {file.size:,} bytes, allowed are {limit:,}; "
            "send a smaller one",
            param=name,
        )
    data = await file.read()
    encoded = await asyncio.to_thread(base64.b64encode, data)
    return f"data:{_FILE_FIELDS[name]};base64,{encoded.decode()}"
