"""`POST /v1/point`, `/count`, `/track`, `/caption`, `/query`: typed answers to typed questions.

Each takes JSON with URLs of media, or a form with files (`body`).

Knows: paths, documentation. Does not know: what is asked (`verb_questions`), how it is answered
(`verb_answers`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from molmo_core import api
from molmo_core.prompts import Verb
from molmo_server.admission import WhileConnected
from molmo_server.answers.verbs import VERBS, VerbSpec
from molmo_server.gateway import Gateway
from molmo_server.routes.body import read_body
from molmo_server.routes.document import SCHEMA_REFERENCE
from molmo_server.routes.verb_answers import Answering
from molmo_server.routes.verb_questions import questions_of
from molmo_server.tenancy.callers import caller_of
from molmo_server.web.plain import PlainRoute

_FILE = {"type": "string", "format": "binary"}
_MEDIA_FIELDS = ("image_url", "images", "video_url")


def verbs_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["verbs"], route_class=PlainRoute)
    for verb, spec in VERBS.items():
        _add_route(router, gateway, verb, spec)
    return router


def _add_route(router: APIRouter, gateway: Gateway, verb: Verb, spec: VerbSpec) -> None:
    async def endpoint(request: Request) -> Response:
        asked = await read_body(request, spec.request, gateway.settings)
        questions = questions_of(verb, asked, gateway.settings, caller_of(request.scope))
        answering = Answering(gateway=gateway, spec=spec, asked=asked, questions=questions)
        is_streamed = isinstance(asked, api.PointingRequest) and asked.stream
        return WhileConnected(answering.stream if is_streamed else answering.send)

    router.add_api_route(
        f"/v1/{verb}",
        endpoint,
        methods=["POST"],
        summary=spec.summary,
        operation_id=verb,
        response_model=None,
        openapi_extra={"requestBody": _documented_body(spec)},
        responses={
            200: {"model": spec.answer, "description": spec.summary, **_documented_stream(spec)}
        },
    )


def _documented_stream(spec: VerbSpec) -> dict[str, Any]:
    if not issubclass(spec.request, api.PointingRequest):
        return {}
    what = "With `stream`: events whose data are `Added` items, then the answer"
    event = {"type": "object", "required": ["data"], "description": what}
    return {"content": {"text/event-stream": {"schema": event}}}


def _documented_body(spec: VerbSpec) -> dict[str, Any]:
    """JSON, or a form in which files stand for the URLs."""
    schema = spec.request.model_json_schema(ref_template=SCHEMA_REFERENCE)
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
    reference = {"$ref": SCHEMA_REFERENCE.format(model=spec.request.__name__)}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": reference},
            "multipart/form-data": {"schema": form},
        },
    }
