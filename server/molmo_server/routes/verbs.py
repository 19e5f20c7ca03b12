"""`POST /v1/point`, `/count`, `/track`, `/caption`, `/query`: typed answers to typed questions.

Each takes JSON with URLs of media, or a form with files (`body`).

Knows: how a verb's request becomes a question. Does not know: what answers hold (`grounding`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Scope, Send

from molmo_core import api
from molmo_core.prompts import Turn, Verb, verb_prompt
from molmo_server.admission import WhileConnected
from molmo_server.answers.verbs import VERBS, VerbSpec, written
from molmo_server.gateway import Gateway, Question
from molmo_server.routes.body import read_body
from molmo_server.telemetry import tell_checkpoint
from molmo_server.tenancy.callers import Caller, caller_of

_FILE = {"type": "string", "format": "binary"}
_MEDIA_FIELDS = ("image_url", "images", "video_url")


def verbs_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["verbs"])
    for verb, spec in VERBS.items():
        _add_route(router, gateway, verb, spec)
    return router


def _add_route(router: APIRouter, gateway: Gateway, verb: Verb, spec: VerbSpec) -> None:
    async def endpoint(request: Request) -> Response:
        asked = await read_body(request, spec.request, gateway.settings)
        question = _question(
            verb,
            spec,
            asked,
            caller=caller_of(request.scope),
            is_constrained=gateway.settings.constrains_verbs,
        )

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
        responses={200: {"model": spec.answer, "description": spec.summary}},
    )


def _documented_body(spec: VerbSpec) -> dict[str, Any]:
    """JSON, or a form in which files stand for the URLs."""
    schema = spec.request.model_json_schema()
    files = {"image": {"type": "array", "items": _FILE, "minItems": 1}, "video": _FILE}
    if "images" not in schema["properties"]:
        del files["image"]
    options = {k: v for k, v in schema["properties"].items() if k not in _MEDIA_FIELDS}
    form = {
        "type": "object",
        "properties": files | options,
        "required": [k for k in schema.get("required", ()) if k not in _MEDIA_FIELDS],
        "oneOf": [{"required": [name]} for name in files],
        "additionalProperties": False,
    }
    reference = {"$ref": f"#/components/schemas/{spec.request.__name__}"}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": reference},
            "multipart/form-data": {"schema": form},
        },
    }


def _question(
    verb: Verb,
    spec: VerbSpec,
    asked: api.GenerationOptions,
    *,
    caller: Caller,
    is_constrained: bool,
) -> Question:
    """`is_constrained`: unless the request says otherwise."""
    wish: bool | None = getattr(asked, "constrained", None)
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
        form=spec.form if (is_constrained if wish is None else wish) else None,
        options=options | ({} if asked.seed is None else {"seed": asked.seed}),
        caller=caller,
    )


async def _answer(
    gateway: Gateway, question: Question, spec: VerbSpec, scope: Scope, send: Send
) -> None:
    request_id = scope["state"]["request_id"]
    completion = await gateway.complete(question, request_id=request_id)
    read = written(
        completion.answer,
        completion.prompt.media,
        request_id=request_id,
        checkpoint=tell_checkpoint(scope, completion.checkpoint_id),
    )
    gateway.note(read.grounding)
    body = spec.read(read).model_dump_json().encode()
    await Response(body, media_type="application/json")(scope, _nothing, send)


async def _nothing() -> Any:
    raise RuntimeError("a finished answer reads nothing")
