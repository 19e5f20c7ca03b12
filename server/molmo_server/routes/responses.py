"""`POST /v1/responses`: OpenAI's newer form of a chat, with the grounding beside the text.

Asked and answered as a chat completion; nothing is kept.

Knows: how a request becomes a question. Does not know: how the answer comes about (`gateway`), what
a response looks like (`answers.responses`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Scope, Send

from molmo_server.admission import WhileConnected
from molmo_server.answers.reading import AnswerReader, read_answer
from molmo_server.answers.responses import Outline, ResponseStream, whole_response
from molmo_server.gateway import Gateway
from molmo_server.openai_api.messages import media_urls_of, system_text, turns_of
from molmo_server.openai_api.responses_request import ResponsesRequest, check_limits
from molmo_server.questions.chat import Asked, Question
from molmo_server.routes.body import read_body
from molmo_server.routes.document import RESPONSES_ANSWER
from molmo_server.routes.sending import send_json, send_stream
from molmo_server.telemetry import tell_checkpoint
from molmo_server.tenancy.callers import caller_of
from molmo_server.web.plain import PlainRoute

_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ResponsesRequest"}}},
}
_ECHOED = {
    *("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "top_logprobs"),
    *("user", "safety_identifier", "prompt_cache_key"),
}


def responses_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["chat"], route_class=PlainRoute)

    @router.post(
        "/v1/responses",
        summary="Ask about images or a video, as OpenAI's endpoint of this name",
        operation_id="responses",
        openapi_extra={"requestBody": _REQUEST_BODY},
        response_class=Response,
        responses=RESPONSES_ANSWER,
    )
    async def responses(request: Request) -> Response:
        call = await read_body(request, ResponsesRequest, gateway.settings, takes_forms=False)
        question = _question(gateway, call, request)

        async def work(scope: Scope, send: Send) -> None:
            if call.stream:
                await _stream(gateway, question, call, scope, send)
            else:
                await _complete(gateway, question, call, scope, send)

        return WhileConnected(work)

    return router


def _question(gateway: Gateway, call: ResponsesRequest, request: Request) -> Question:
    settings = gateway.settings
    check_limits(call, max_logprobs=settings.max_logprobs)
    messages = call.messages()
    image_urls, video_urls = media_urls_of(messages)
    return Question(
        turns=turns_of(messages),
        system=system_text(messages),
        image_urls=image_urls,
        video_urls=video_urls,
        model=call.model,
        max_tokens=call.max_output_tokens,
        options=call.engine_options(max_schema_bytes=settings.max_schema_bytes),
        caller=caller_of(request.scope),
    )


def _outline(
    gateway: Gateway, call: ResponsesRequest, request_id: str, checkpoint_id: str
) -> Outline:
    told = call.model_dump(include=_ECHOED)
    defaults = {"metadata": {}, "temperature": 1.0, "top_p": 1.0}
    form: dict[str, Any] = call.form.model_dump(by_alias=True, exclude_none=True)
    return Outline(
        request_id=request_id,
        model=gateway.settings.served_name,
        checkpoint_id=checkpoint_id,
        echoed={
            **{k: defaults.get(k) if v is None else v for k, v in told.items()},
            "text": {"format": form},
        },
    )


async def _complete(
    gateway: Gateway, question: Question, call: ResponsesRequest, scope: Scope, send: Send
) -> None:
    request_id = scope["state"]["request_id"]
    completion = await gateway.complete(question, request_id=request_id)
    answer = completion.answer
    choice = answer["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content")
    text = choice["message"]["content"] or ""
    grounding = read_answer(text, completion.prompt.media, tokens)
    gateway.note(grounding)
    outline = _outline(gateway, call, request_id, tell_checkpoint(scope, completion.checkpoint_id))
    await send_json(whole_response(outline, answer, grounding), scope, send)


async def _stream(
    gateway: Gateway, question: Question, call: ResponsesRequest, scope: Scope, send: Send
) -> None:
    request_id = scope["state"]["request_id"]

    def relay_for(asked: Asked) -> ResponseStream:
        media, visual_usage = asked.prompt.media, asked.prompt.visual_usage()
        outline = _outline(gateway, call, request_id, asked.answering)
        return ResponseStream(outline, lambda: AnswerReader(media, gateway.note), visual_usage)

    opened = gateway.open(question, request_id=request_id, whole=False)
    await send_stream(opened, relay_for, scope, send)
