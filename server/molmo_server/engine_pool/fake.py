"""A scripted engine: vLLM's chat API on a Unix socket without a model, for tests.

The answer follows from the last user text: a script maps substrings to answers. Some words make
it misbehave: see `Trick`. Runs inside a test (`serve_fake`) or as a process of its own, as the
real engine does: `python -m molmo_server.engine_pool.fake --uds SOCKET --script JSON`.

Knows: the wire format of vLLM's chat endpoint. Does not know: models, images, the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aiohttp import web

DEFAULT_ANSWER = 'Counting the <points coords="1 1 250 500">red circle</points> shows a total of 1.'


class Trick(StrEnum):
    """Words in a question that make the engine misbehave."""

    HANG = "[hang]"  # never answers
    WEDGE = "[wedge]"  # never answers this nor anything after it, while health stays good
    DIE = "[die]"  # the process is killed before the first byte
    DIE_LATE = "[die late]"  # in the middle of the answer
    BREAK = "[break]"  # the connection is closed in the middle of the answer
    BREAK_FIRST = "[break first]"  # the first request of this text breaks before its first byte
    FAIL = "[500]"
    REFUSE = "[400]"
    REFUSE_GRAMMAR = "[no grammars]"  # 400 for what it is to decode under
    FULL = "[503]"
    SLOW = "[slow]"  # twenty pieces a second
    ERROR_EVENT = "[error event]"  # a stream that tells of a failure
    PAGE = "[page]"  # 200 with something that no engine says
    NOISE = "[noise]"  # bytes that are not HTTP


@dataclass(kw_only=True)
class FakeEngine:
    """Answers `script[substring]` or `default`, streamed in pieces of about four characters."""

    script: dict[str, str] = field(default_factory=dict)
    default: str = DEFAULT_ANSWER
    trick: str = ""
    """As if every question had this word."""
    is_healthy: bool = True
    is_wedged: bool = False
    takes_media_options: bool = True
    """As engines of ours say."""
    n_tokens: int = 0
    """As the engine's metrics count them."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies as received, oldest first."""
    traceparents: list[str | None] = field(default_factory=list)
    """Of each request, in the same order."""
    n_dropped: int = 0
    """Answers that the caller did not wait for."""
    seconds_per_piece: float = 0.0
    loaded: list[str] = field(default_factory=list)
    """Versions of the weights that it was told to load, oldest first."""
    load_statuses: list[int] = field(default_factory=list)
    """What the next loads are answered with; 200 when there is none left."""
    logprobs: dict[str, float] = field(default_factory=dict)
    """Version → the log-probability of every token of its answers; -1 unless named. What was
    never told to load anything has the version ""."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=256 * 1024 * 1024)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/molmo/weights", self._load)
        app.router.add_get("/molmo/weights", self._loaded)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_healthy else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text="# HELP vllm:num_requests_running Running.\nvllm:num_requests_running 0\n"
            f'vllm:generation_tokens_total{{engine="0"}} {self.n_tokens}\nprocess_open_fds 7\n'
        )

    async def _loaded(self, request: web.Request) -> web.Response:
        version = self.loaded[-1] if self.loaded else "fake"
        return web.json_response(
            {"version": version, "takes_media_options": self.takes_media_options}
        )

    async def _load(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        status = self.load_statuses.pop(0) if self.load_statuses else 200
        await asyncio.sleep(self.seconds_per_piece)
        if status == 200:
            self.loaded.append(wanted["version"])
            return web.json_response({"version": wanted["version"]})
        return web.json_response({"error": {"message": "shapes differ"}}, status=status)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.traceparents.append(request.headers.get("traceparent"))
        question = question_of(body) + self.trick
        if trouble := await self._misbehave(question, request):
            return trouble
        if Trick.REFUSE_GRAMMAR in question and "structured_outputs" in body:
            refusal = {"message": "unknown field structured_outputs"}
            return web.json_response({"error": refusal}, status=400)
        answer = next((a for key, a in self.script.items() if key in question), self.default)
        pieces = re.findall(r".{1,4}", answer, re.DOTALL)
        max_tokens = body.get("max_tokens", len(pieces))
        finish = "length" if len(pieces) > max_tokens else "stop"
        pieces = pieces[:max_tokens]
        identity = {
            "id": f"chatcmpl-{request.headers.get('x-request-id', 'none')}",
            "created": 1_700_000_000,
            "model": body["model"],
            "system_fingerprint": "vllm-fake",
        }
        usage = {
            "prompt_tokens": len(question.split()),
            "completion_tokens": len(pieces),
            "total_tokens": len(question.split()) + len(pieces),
        }
        if body.get("stream"):
            return await self._stream(request, body, identity, pieces, finish, usage)
        if Trick.DIE_LATE in question:
            os.kill(os.getpid(), signal.SIGKILL)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(pieces)}
        extra: dict[str, Any] = logprobs_of("".join(pieces)) if body.get("logprobs") else {}
        extra = self._tokens(max_tokens) if body.get("return_tokens_as_token_ids") else extra
        choices = [
            {"index": k, "message": message, "finish_reason": finish, **extra}
            for k in range(body.get("n", 1))
        ]
        await asyncio.sleep(self.seconds_per_piece * len(pieces))
        whole = {"object": "chat.completion", **identity, "choices": choices, "usage": usage}
        return web.json_response(whole)

    def _tokens(self, n_tokens: int) -> dict[str, Any]:
        """As asked of probes: always the same token, as probable as the weights say."""
        version = self.loaded[-1] if self.loaded else ""
        token: dict[str, Any] = {
            "token": "token_id:7",
            "logprob": self.logprobs.get(version, -1.0),
        }
        token["top_logprobs"] = [dict(token)]
        return {"logprobs": {"content": [token] * n_tokens}}

    async def _misbehave(self, question: str, request: web.Request) -> web.Response | None:
        self.is_wedged = self.is_wedged or Trick.WEDGE in question
        if self.is_wedged or Trick.HANG in question:
            try:
                await asyncio.Event().wait()
            finally:
                self.n_dropped += 1
        if Trick.DIE in question:
            os.kill(os.getpid(), signal.SIGKILL)
        if Trick.BREAK_FIRST in question and self._is_asked_first(question):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if Trick.NOISE in question:
            assert isinstance(request.transport, asyncio.Transport)
            request.transport.write(b"\0\1 noise\r\n\r\n")
            request.transport.close()
            return web.Response()
        if Trick.PAGE in question:
            return web.Response(text="<html>It works</html>", content_type="text/html")
        for trick, status in ((Trick.FAIL, 500), (Trick.REFUSE, 400), (Trick.FULL, 503)):
            if trick in question:
                message = "cannot identify image file <_io.BytesIO object at 0x7f00deadbeef>"
                return web.json_response({"error": {"message": message}}, status=status)
        return None

    def _is_asked_first(self, question: str) -> bool:
        return sum("messages" in b and question_of(b) == question for b in self.requests) == 1

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        identity: dict[str, Any],
        pieces: list[str],
        finish: str,
        usage: dict[str, int],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        question = question_of(body) + self.trick
        events = stream_events(
            identity,
            pieces,
            finish,
            n_choices=body.get("n", 1),
            has_logprobs=bool(body.get("logprobs")),
        )
        if body.get("stream_options", {}).get("include_usage"):
            tail = {"object": "chat.completion.chunk", **identity, "choices": [], "usage": usage}
            events.append(f"data: {json.dumps(tail)}\n\n")
        try:
            for k, event in enumerate(events):
                if k == len(events) // 2:
                    self._break(question, request)
                    if Trick.ERROR_EVENT in question:
                        await response.write(b'data: {"error": {"message": "EngineDead"}}\n\n')
                        break
                await response.write(event.encode())
                if pause_s := 0.05 if Trick.SLOW in question else self.seconds_per_piece:
                    await asyncio.sleep(pause_s)
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.n_dropped += 1
            raise
        return response

    def _break(self, question: str, request: web.Request) -> None:
        if Trick.DIE_LATE in question:
            os.kill(os.getpid(), signal.SIGKILL)
        if Trick.BREAK in question and request.transport is not None:
            request.transport.abort()
            raise ConnectionResetError("told to break")


def stream_events(
    identity: dict[str, Any],
    pieces: list[str],
    finish: str,
    *,
    n_choices: int,
    has_logprobs: bool = False,
) -> list[str]:
    """The events of one answer without usage and `[DONE]`; every choice gets the same text."""
    events = []

    def add(index: int, delta: dict[str, Any], finish_reason: str | None) -> None:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish_reason}
        if has_logprobs:
            choice |= logprobs_of(delta.get("content", ""))
        chunk = {"object": "chat.completion.chunk", **identity, "choices": [choice]}
        events.append(f"data: {json.dumps(chunk)}\n\n")

    for index in range(n_choices):
        add(index, {"role": "assistant", "content": ""}, None)
        for piece in pieces:
            add(index, {"content": piece}, None)
        add(index, {}, finish)
    return events


def logprobs_of(text: str) -> dict[str, Any]:
    """A token a character, of probability 0.8, with 0 and 5 of 0.1 each beside it."""
    content = [
        {
            "token": char,
            "logprob": math.log(0.8),
            "top_logprobs": [
                {"token": char, "logprob": math.log(0.8)},
                *({"token": one, "logprob": math.log(0.1)} for one in "05" if one != char),
                {"token": "x", "logprob": -20.0},
            ],
        }
        for char in text
    ]
    return {"logprobs": {"content": content}}


def question_of(body: dict[str, Any]) -> str:
    """The last user text."""
    content = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@asynccontextmanager
async def serve_fake(engine: FakeEngine, socket: Path) -> AsyncIterator[None]:
    """Answer on a Unix socket as long as the block runs."""
    # As vLLM does: an answer that nobody waits for is not finished.
    runner = web.AppRunner(engine.app(), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(socket)).start()
    try:
        yield
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted engine for tests")
    parser.add_argument("--uds", type=Path, required=True)
    parser.add_argument("--script", type=json.loads, default={})
    parser.add_argument("--logprob", type=float, default=-1.0, help="of every token of probes")
    parser.add_argument("--child-pid-file", type=Path, help="start a child, as engines do")
    parser.add_argument("--fail-if", type=Path, help="end with status 3 when this file exists")
    parser.add_argument("--then-touch", type=Path, help="make this file when it has started")
    arguments = parser.parse_args()
    if arguments.fail_if is not None and arguments.fail_if.exists():
        raise SystemExit("told to fail while starting")
    if arguments.child_pid_file is not None:
        child = os.fork()
        if child == 0:
            signal.pause()
        arguments.child_pid_file.write_text(str(child))
    engine = FakeEngine(script=arguments.script, logprobs={"": arguments.logprob})
    asyncio.run(_serve_until_told(engine, arguments.uds, arguments.then_touch))


async def _serve_until_told(engine: FakeEngine, socket: Path, then_touch: Path | None) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with serve_fake(engine, socket):
        if then_touch is not None:
            then_touch.touch()
        await ended.wait()
    sys.stdout.write("ended in order\n")


if __name__ == "__main__":
    main()
