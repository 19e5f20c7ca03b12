"""The scripted engine with vLLM's completions beside its chat."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from molmo_server.engine_pool.fake import FakeEngine, Trick


class FakeWithCompletions(FakeEngine):
    """Goes on with `script[substring]` or `default`, a word a token; ids go on with their sum."""

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/v1/completions", self._completions)
        return app

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        prompts = _prompts(body["prompt"])
        identity = {
            "id": f"cmpl-{request.headers['x-request-id']}",
            "object": "text_completion",
            "created": 1_700_000_000,
            "model": body["model"],
        }
        choices = [self._choice(body, p) for p in prompts for _ in range(body.get("n", 1))]
        choices = [{"index": k, **choice} for k, choice in enumerate(choices)]
        n_prompt = sum(len(p) if isinstance(p, list) else len(p.split()) for p in prompts)
        n_answer = sum(len(choice["text"].split()) for choice in choices)
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        }
        if not body.get("stream"):
            return web.json_response({**identity, "choices": choices, "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        is_broken = any(Trick.ERROR_EVENT in str(p) for p in prompts)
        for event in _events(body, identity, choices, usage, is_broken):
            await response.write(event)
        return response

    def _choice(self, body: dict[str, Any], prompt: Any) -> dict[str, Any]:
        text = " " + str(sum(prompt)) if isinstance(prompt, list) else self._said(prompt)
        words = text.split(" ")[: body["max_tokens"] + 1]
        echoed = prompt if body.get("echo") and isinstance(prompt, str) else ""
        text = echoed + " ".join(words)
        choice = {"text": text, "finish_reason": "stop", "logprobs": None}
        if (n_best := body.get("logprobs")) is not None:
            tokens = text.split(" ")
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [None, *([-0.5] * (len(tokens) - 1))],
                "top_logprobs": [None, *([{"a": -0.5}] * (len(tokens) - 1))] if n_best else None,
                "text_offset": [text.index(token) for token in tokens],
            }
        return choice

    def _said(self, prompt: str) -> str:
        return next((a for key, a in self.script.items() if key in prompt), self.default)


def _prompts(prompt: Any) -> list[Any]:
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_one else prompt


def _events(
    body: dict[str, Any],
    identity: dict[str, Any],
    choices: list[dict[str, Any]],
    usage: dict[str, int],
    is_broken: bool,
) -> list[bytes]:
    chunks: list[dict[str, Any]] = []
    for choice in choices:
        words = choice["text"].split(" ")
        pieces = [words[0], *(f" {word}" for word in words[1:])]
        reasons = [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        chunks += [
            {
                **identity,
                "choices": [{"index": choice["index"], "text": piece, "finish_reason": reason}],
            }
            for piece, reason in zip(pieces, reasons, strict=True)
        ]
    if is_broken:
        chunks = [chunks[0], {"error": {"message": "EngineDead"}}]
    elif body.get("stream_options", {}).get("include_usage"):
        chunks.append({**identity, "choices": [], "usage": usage})
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return [*events, b"data: [DONE]\n\n"]
