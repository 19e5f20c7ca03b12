"""`POST /v1/completions`: a text goes on, without a chat around it and without media.

Knows: OpenAI's request and answer. Does not know: how the answer comes about (`gateway`).
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.types import Scope, Send

from molmo_server.admission import WhileConnected
from molmo_server.answers.completions_relay import CompletionsRelay
from molmo_server.engine.launch import is_drafting
from molmo_server.gateway import Gateway
from molmo_server.openai_api.completions_request import CompletionsRequest, check_limits
from molmo_server.questions.texts import AskedTexts, TextQuestion
from molmo_server.routes.body import read_body
from molmo_server.routes.document import COMPLETIONS_ANSWER
from molmo_server.routes.sending import send_json, send_stream
from molmo_server.telemetry import tell_checkpoint
from molmo_server.tenancy.callers import caller_of
from molmo_server.web.plain import PlainRoute

_REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/CompletionsRequest"}}
    },
}


def completions_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["chat"], route_class=PlainRoute)
    is_own = gateway.settings.n_own_engines > 0
    takes_min_p = not (is_own and is_drafting(gateway.settings.drafts))

    @router.post(
        "/v1/completions",
        summary="Go on from a text, or tell how probable it is",
        operation_id="completions",
        openapi_extra={"requestBody": _REQUEST_BODY},
        response_class=Response,
        responses=COMPLETIONS_ANSWER,
    )
    async def completions(request: Request) -> Response:
        call = await read_body(request, CompletionsRequest, gateway.settings, takes_forms=False)
        question = _question(gateway, call, request, takes_min_p=takes_min_p)

        async def work(scope: Scope, send: Send) -> None:
            if call.stream:
                await _stream(gateway, question, call, scope, send)
            else:
                await _complete(gateway, question, scope, send)

        return WhileConnected(work)

    return router


def _question(
    gateway: Gateway, call: CompletionsRequest, request: Request, *, takes_min_p: bool
) -> TextQuestion:
    settings = gateway.settings
    check_limits(
        call,
        max_prompts=settings.max_prompts,
        max_choices=settings.max_choices,
        max_logprobs=settings.max_logprobs,
        max_stops=settings.max_stops,
        takes_min_p=takes_min_p,
    )
    return TextQuestion(
        texts=call.prompt,
        model=call.model,
        max_tokens=call.asked_tokens,
        options=call.engine_options(),
        tells_values=call.tells_values,
        caller=caller_of(request.scope),
    )


async def _complete(gateway: Gateway, question: TextQuestion, scope: Scope, send: Send) -> None:
    request_id = scope["state"]["request_id"]
    answer, checkpoint_id = await gateway.complete_texts(question, request_id=request_id)
    answer["system_fingerprint"] = tell_checkpoint(scope, checkpoint_id)
    await send_json(answer, scope, send)


async def _stream(
    gateway: Gateway, question: TextQuestion, call: CompletionsRequest, scope: Scope, send: Send
) -> None:
    def relay_for(asked: AskedTexts) -> CompletionsRelay:
        return CompletionsRelay(hides_usage=call.hides_usage)

    request_id = scope["state"]["request_id"]
    opened = gateway.open_texts(question, request_id=request_id, whole=False)
    await send_stream(opened, relay_for, scope, send)
