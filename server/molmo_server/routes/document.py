"""The OpenAPI document, as truthful as the service: a test asks every operation by it.

FastAPI writes it from the routes; what it cannot know stands here: bodies that routes read by
themselves, whole chat completions, errors, headers, and which operations ask for a key.

Knows: OpenAPI. Does not know: what operations do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from molmo_core import api
from molmo_core.api_batches import BatchRequest
from molmo_server.answers.verbs import VERBS
from molmo_server.openai_api.chat_request import ChatRequest
from molmo_server.openai_api.completions_request import CompletionsRequest
from molmo_server.openai_api.responses_request import ResponsesRequest

SCHEMA_REFERENCE = "#/components/schemas/{model}"
_NEVER_ANSWERED = "422"
"""FastAPI's status for what does not validate; here that is a 400 with OpenAI's envelope."""
_NEVER_ANSWERED_SCHEMAS = ("HTTPValidationError", "ValidationError")
_TEXT = {"schema": {"type": "string"}}
_NAMED_EVENTS = {"schema": {"type": "object", "required": ["event", "data"]}}
"""Of a stream whose events have names beside their data."""


class _EngineAnswer(BaseModel):
    """The engine adds fields of its own."""

    model_config = ConfigDict(extra="allow")


class ChatMessage(_EngineAnswer):
    role: Literal["assistant"]
    content: str | None
    grounding: api.Grounding


class ChatChoice(_EngineAnswer):
    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(_EngineAnswer):
    """OpenAI's, with `message.grounding`; `system_fingerprint` names the checkpoint."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: api.Usage


class TextCompletion(_EngineAnswer):
    """OpenAI's; `system_fingerprint` names the checkpoint."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: api.Usage


class ResponseAnswer(_EngineAnswer):
    """OpenAI's response, with the grounding of its text."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    grounding: api.Grounding


def _answer(
    what: str, model: type[BaseModel], events: dict[str, Any] = _TEXT
) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": f"{what}; with `stream` as events",
            "content": {
                "application/json": {
                    "schema": {"$ref": SCHEMA_REFERENCE.format(model=model.__name__)}
                },
                "text/event-stream": events,
            },
        }
    }


CHAT_ANSWER = _answer("OpenAI's chat completion", ChatCompletion)
COMPLETIONS_ANSWER = _answer("OpenAI's completion", TextCompletion)
RESPONSES_ANSWER = _answer("OpenAI's response", ResponseAnswer, _NAMED_EVENTS)
PLAIN_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": _TEXT}}}
_READ_BY_ROUTES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    ChatCompletion,
    CompletionsRequest,
    TextCompletion,
    ResponsesRequest,
    ResponseAnswer,
    BatchRequest,
    api.ErrorEnvelope,
    *(spec.request for spec in VERBS.values()),
)


def openapi_document(app: FastAPI, *, asks_for_keys: bool) -> dict[str, Any]:
    """The document of `app`, made once; `asks_for_keys`: under /v1, under /admin it always does."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        _add_schemas(document["components"]["schemas"])
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operation in _operations(document):
            _complete_responses(operation["responses"])
            is_closed = path.startswith("/admin") or (asks_for_keys and path.startswith("/v1"))
            operation["security"] = [{"key": []}] if is_closed else []
        app.openapi_schema = document
    return app.openapi_schema


def _add_schemas(schemas: dict[str, Any]) -> None:
    for name in _NEVER_ANSWERED_SCHEMAS:
        schemas.pop(name, None)
    for model in _READ_BY_ROUTES:
        own = model.model_json_schema(ref_template=SCHEMA_REFERENCE)
        schemas |= own.pop("$defs", {}) | {model.__name__: own}


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            yield path, operation


def _complete_responses(responses: dict[str, Any]) -> None:
    """Every operation may be refused or fail; every answer has an id."""
    responses.pop(_NEVER_ANSWERED, None)
    envelope = {"schema": {"$ref": SCHEMA_REFERENCE.format(model=api.ErrorEnvelope.__name__)}}
    for statuses, what in (("4XX", "Refused"), ("5XX", "Failed")):
        known = responses.setdefault(statuses, {"description": what})
        known["content"] = {"application/json": envelope}
    for response in responses.values():
        response["headers"] = response.get("headers", {}) | {
            "x-request-id": {"required": True, **_TEXT},
            "x-molmo-checkpoint": {"required": True, **_TEXT},
        }
