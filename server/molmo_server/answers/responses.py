"""OpenAI's response object and its stream, made of the engine's chat completion.

`grounding` stands beside the text, and once more beside `output`. A stream tells each place in an
event of its own as soon as it is written, as an annotation of a type that OpenAI does not have; the
text's list of annotations stays empty, because OpenAI's clients know their types and complain of
others.

Knows: the objects and events of OpenAI's responses. Does not know: requests (what is echoed of one
comes as a dictionary), HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from molmo_core import api
from molmo_core.errors import MolmoError
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.splitting import EventSplitter
from molmo_server.answers.usage import tell_visual_tokens

_NO_TOOLS = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False}
_NOTHING_KEPT = {"store": False, "background": False, "previous_response_id": None}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What of a response is known before the model has said anything."""

    request_id: str
    model: str
    checkpoint_id: str
    echoed: dict[str, Any]
    """Fields of the request that a response repeats."""
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def item_id(self) -> str:
        return f"msg_{self.request_id}"

    def response(self, status: str, **fields: Any) -> dict[str, Any]:
        """The object as it is in this state; `fields` take the place of what stands there."""
        return {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "system_fingerprint": self.checkpoint_id,
            "output": [],
            "usage": None,
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "service_tier": "default",
            **_NO_TOOLS,
            **_NOTHING_KEPT,
            **self.echoed,
            **fields,
        }

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def ended(
        self, part: dict[str, Any], finish_reason: str | None, usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The whole response around its one text."""
        is_cut = finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        return self.response(
            status,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            output=[self.item(status, [part])],
            usage=usage and _usage(usage),
            grounding=part["grounding"],
        )


def whole_response(
    outline: Outline, answer: dict[str, Any], grounding: api.Grounding
) -> dict[str, Any]:
    """The engine's chat completion as a response."""
    choice = answer["choices"][0]
    told = (choice.get("logprobs") or {}).get("content") or []
    part = _text_part(choice["message"]["content"] or "", grounding, _logprobs(told))
    return outline.ended(part, choice["finish_reason"], answer.get("usage"))


def _text_part(
    text: str, grounding: api.Grounding, logprobs: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": logprobs,
        "grounding": grounding.model_dump(mode="json"),
    }


def _logprobs(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As chat completions have them, which may lack a token's bytes."""
    return [
        {
            "token": one["token"],
            "bytes": one.get("bytes") or [],
            "logprob": one["logprob"],
            **({"top_logprobs": _logprobs(one["top_logprobs"])} if "top_logprobs" in one else {}),
        }
        for one in told
    ]


def _usage(told: dict[str, Any]) -> dict[str, Any]:
    details = {k: v for k, v in (told.get("prompt_tokens_details") or {}).items() if v is not None}
    return {
        "input_tokens": told["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, **details},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": told["total_tokens"],
    }


class ResponseStream:
    """Feed the bytes of the engine's chat stream, get those of a response, until `has_ended`."""

    def __init__(
        self, outline: Outline, new_reader: Callable[[], AnswerReader], visual_usage: dict[str, int]
    ) -> None:
        self._outline = outline
        self._reader = new_reader()
        self._visual_usage = visual_usage
        self._events = EventSplitter()
        self._n_sent = self._n_annotations = 0
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        return self._events.has_ended

    @property
    def n_tokens(self) -> int:
        """Of the answer: as the engine told at its end; else the pieces of text."""
        if self._usage is not None:
            return int(self._usage["completion_tokens"])
        return len(self._texts)

    @property
    def n_prompt_tokens(self) -> int | None:
        """As the engine told, which it does at its end."""
        return None if self._usage is None else int(self._usage["prompt_tokens"])

    def feed(self, chunk: bytes) -> bytes:
        sent = [] if self._n_sent else [*self._opening()]
        for _, content in self._events.feed(chunk):
            self._usage = content.get("usage") or self._usage
            for choice in content.get("choices", ()):
                sent += self._pieces(choice)
        if self._events.is_done:
            sent += self._closing()
        return b"".join(sent)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        self._events.check_end()

    def failure(self, error: MolmoError) -> bytes:
        """How a stream that has begun ends when it cannot go on."""
        told = {"code": "server_error", "message": error.message}
        response = self._outline.response("failed", error=told)
        return self._event("response.failed", response=response)

    def _opening(self) -> Iterator[bytes]:
        outline = self._outline
        for what in ("created", "in_progress"):
            yield self._event(f"response.{what}", response=outline.response("in_progress"))
        item = outline.item("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._of_the_text("response.content_part.added", part=part)

    def _pieces(self, choice: dict[str, Any]) -> Iterator[bytes]:
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        tokens = (choice.get("logprobs") or {}).get("content") or []
        logprobs = _logprobs(tokens)
        self._logprobs += logprobs
        if text := choice["delta"].get("content"):
            self._texts.append(text)
            yield self._of_the_text("response.output_text.delta", delta=text, logprobs=logprobs)
            yield from map(self._annotation, self._reader.feed(text, tokens))

    def _closing(self) -> Iterator[bytes]:
        if self._usage is not None:
            tell_visual_tokens(self._usage, self._visual_usage)
        grounding = self._reader.close()
        part = _text_part("".join(self._texts), grounding, self._logprobs)
        yield from map(self._annotation, self._reader.late)
        yield self._of_the_text(
            "response.output_text.done", text=part["text"], logprobs=self._logprobs
        )
        yield self._of_the_text("response.content_part.done", part=part)
        response = self._outline.ended(part, self._finish_reason, self._usage)
        item = response["output"][0]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _annotation(self, observed: api.Observation) -> bytes:
        fields = observed.model_dump(mode="json")
        annotation = {"type": fields.pop("kind"), **fields}
        self._n_annotations += 1
        return self._of_the_text(
            "response.output_text.annotation.added",
            annotation_index=self._n_annotations - 1,
            annotation=annotation,
        )

    def _of_the_text(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._outline.item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._n_sent, **fields}
        self._n_sent += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"
