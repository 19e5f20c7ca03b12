"""`POST /v1/point`, `/count`, `/track`, `/caption`, `/query`: typed answers to typed questions.

Each takes JSON with data URLs, or a form with files: `image` (repeatable) or `video`, and the
other fields by their names.

Knows: the two ways to send a request. Does not know: what the answers hold (`grounding`).
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.types import Scope, Send

from molmo_core import api
from molmo_core.errors import InvalidMedia, InvalidRequest, UnknownField
from molmo_core.prompts import Turn, Verb, verb_prompt
from molmo_server.admission import WhileConnected
from molmo_server.errors import parse_fields, parse_json
from molmo_server.gateway import Gateway, Question
from molmo_server.grounding import VERBS, VerbSpec, written
from molmo_server.settings import MolmoSettings

_FILE_FIELDS = {"image": "image/png", "video": "video/mp4"}
"""Media type by field: the kind is what matters, the content is looked at later."""
_MAX_FORM_FIELDS = 32


def verbs_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["verbs"])
    for verb, spec in VERBS.items():
        _add_route(router, gateway, verb, spec)
    return router


def _add_route(router: APIRouter, gateway: Gateway, verb: Verb, spec: VerbSpec) -> None:
    async def endpoint(request: Request) -> Response:
        asked = await _parse(request, spec, gateway.settings)
        question = _question(verb, spec, asked)

        async def work(scope: Scope, send: Send) -> None:
            await _answer(gateway, question, spec, scope, send)

        return WhileConnected(work)

    router.add_api_route(
        f"/v1/{verb}",
        endpoint,
        methods=["POST"],
        summary=spec.summary,
        operation_id=verb,
        response_model=None,
        openapi_extra={"requestBody": _documented_body(spec)},
        responses={
            200: {"model": spec.answer, "description": spec.summary},
            "4XX": {"model": api.ErrorEnvelope},
            "5XX": {"model": api.ErrorEnvelope},
        },
    )


def _documented_body(spec: VerbSpec) -> dict[str, Any]:
    files = {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}}
    files["video"] = {"type": "string", "format": "binary"}
    others = spec.request.model_json_schema()["properties"].items()
    fields = {k: v for k, v in others if k not in ("image_url", "images", "video_url")}
    name = spec.request.__name__
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}},
            "multipart/form-data": {"schema": {"type": "object", "properties": files | fields}},
        },
    }


async def _parse(
    request: Request, spec: VerbSpec, settings: MolmoSettings
) -> api.GenerationOptions:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        return parse_json(await request.body(), spec.request)
    form = await request.form(
        max_files=settings.max_images + 2, max_fields=_MAX_FORM_FIELDS, max_part_size=1024 * 1024
    )
    try:
        fields = await _fields_of(form, settings)
    finally:
        await form.close()
    return parse_fields(fields, spec.request, is_strict=False)


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
            fields[name] = value
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


def _question(verb: Verb, spec: VerbSpec, asked: api.GenerationOptions) -> Question:
    image_urls: list[str] = asked.image_urls  # type: ignore[attr-defined]
    video_url: str | None = asked.video_url  # type: ignore[attr-defined]
    text = getattr(asked, spec.text_field) if spec.text_field else ""
    wording = verb_prompt(verb, text, n_images=len(image_urls), has_video=video_url is not None)
    options: dict[str, Any] = {"temperature": asked.temperature}
    return Question(
        turns=(Turn(role="user", text=wording),),
        image_urls=image_urls,
        video_urls=() if video_url is None else (video_url,),
        model=asked.model,
        max_tokens=asked.max_tokens,
        options=options | ({} if asked.seed is None else {"seed": asked.seed}),
    )


async def _answer(
    gateway: Gateway, question: Question, spec: VerbSpec, scope: Scope, send: Send
) -> None:
    request_id = scope["state"]["request_id"]
    prompt, completion = await gateway.complete(question, request_id=request_id)
    read = written(
        completion, prompt.media, request_id=request_id, checkpoint=gateway.checkpoint.id
    )
    gateway.note(read.grounding)
    body = spec.read(read).model_dump_json().encode()
    await Response(body, media_type="application/json")(scope, _nothing, send)


async def _nothing() -> Any:
    raise RuntimeError("a finished answer reads nothing")
