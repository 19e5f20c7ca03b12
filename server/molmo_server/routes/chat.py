"""`POST /v1/chat/completions`: OpenAI's chat, with grounding added to the answer.

Knows: OpenAI's request and answer. Does not know: how the answer comes about (`gateway`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Scope, Send

from molmo_server.admission import WhileConnected
from molmo_server.answers.reading import AnswerReader, read_answer
from molmo_server.answers.relay import StreamRelay
from molmo_server.engine.launch import is_drafting
from molmo_server.gateway import Gateway
from molmo_server.openai_api.chat_request import ChatRequest, check_limits
from molmo_server.questions.chat import Asked, Question
from molmo_server.routes.body import read_body
from molmo_server.routes.document import CHAT_ANSWER
from molmo_server.routes.sending import send_json, send_stream
from molmo_server.telemetry import tell_checkpoint
from molmo_server.tenancy.callers import caller_of
from molmo_server.web.plain import PlainRoute

_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
}


def chat_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["chat"], route_class=PlainRoute)
    is_own = gateway.settings.n_own_engines > 0
    takes_min_p = not (is_own and is_drafting(gateway.settings.drafts))

    @router.post(
        "/v1/chat/completions",
        summary="Chat about images or a video, as OpenAI's endpoint of this name",
        operation_id="chat",
        openapi_extra={"requestBody": _REQUEST_BODY},
        response_class=Response,
        responses=CHAT_ANSWER,
    )
    async def chat(request: Request) -> Response:
        settings = gateway.settings
        call = await read_body(request, ChatRequest, settings, takes_forms=False)
        check_limits(
            call,
            max_choices=settings.max_choices,
            max_logprobs=settings.max_logprobs,
            max_stops=settings.max_stops,
            takes_min_p=takes_min_p,
        )
        image_urls, video_urls = call.media_urls()
        caller = caller_of(request.scope)
        question = Question(
            turns=call.turns(),
            system=call.system(),
            image_urls=image_urls,
            video_urls=video_urls,
            model=call.model,
            max_tokens=call.asked_tokens,
            shape=call.shape(),
            constrained=True,
            options=call.engine_options(max_schema_bytes=settings.max_schema_bytes),
            is_continued=call.continue_final_message,
            media_options=call.media_options,
            caller=caller,
        )

        async def work(scope: Scope, send: Send) -> None:
            if call.stream:
                await _stream(gateway, question, scope, send, hides_usage=call.hides_usage)
            else:
                await _complete(gateway, question, scope, send)

        return WhileConnected(work)

    return router


async def _complete(gateway: Gateway, question: Question, scope: Scope, send: Send) -> None:
    request_id = scope["state"]["request_id"]
    completion = await gateway.complete(question, request_id=request_id)
    prompt, answer = completion.prompt, completion.answer
    answer["system_fingerprint"] = tell_checkpoint(scope, completion.checkpoint_id)
    for choice in answer["choices"]:
        message: dict[str, Any] = choice["message"]
        tokens = (choice.get("logprobs") or {}).get("content")
        grounding = read_answer(message["content"] or "", prompt.media, tokens)
        gateway.note(grounding)
        message["grounding"] = grounding.model_dump(mode="json")
    await send_json(answer, scope, send)


async def _stream(
    gateway: Gateway, question: Question, scope: Scope, send: Send, *, hides_usage: bool
) -> None:
    request_id = scope["state"]["request_id"]

    def relay_for(asked: Asked) -> StreamRelay:
        return _relay(gateway, asked, request_id, hides_usage=hides_usage)

    opened = gateway.open(question, request_id=request_id, whole=False)
    await send_stream(opened, relay_for, scope, send)


def _relay(gateway: Gateway, asked: Asked, request_id: str, *, hides_usage: bool) -> StreamRelay:
    def new_reader() -> AnswerReader:
        return AnswerReader(asked.prompt.media, gateway.note)

    return StreamRelay(
        new_reader,
        stream_id=f"chatcmpl-{request_id}",
        model=asked.settings.served_name,
        fingerprint=asked.answering,
        hides_usage=hides_usage,
        visual_usage=asked.prompt.visual_usage(),
    )
