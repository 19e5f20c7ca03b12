"""The engine's event stream, passed on byte for byte, with the grounding added before its end.

Knows: server-sent events of OpenAI's chat stream. Does not know: where bytes come from or go.

Events are looked at (the text is needed for the grounding) and not written anew, but for the one
that tells the usage of a prompt with media. Only that and `[DONE]` are held back, and an event that
tells of the engine's failure becomes an error of our own. Where usage is counted the engine is made
to tell it, and that event is left out for callers who did not ask for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import orjson

from molmo_core.errors import EngineFailed, MolmoError
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.usage import tell_visual_tokens
from molmo_server.errors import error_body

_PREFIX = b"data: "
_END = b"\n\n"
_LAST = _PREFIX + b"[DONE]"


def error_events(error: MolmoError) -> bytes:
    """How a stream that has begun ends when it cannot go on."""
    return _PREFIX + error_body(error) + _END + _LAST + _END


class StreamRelay:
    """Feed the engine's bytes, get the bytes for the caller, until `has_ended`."""

    def __init__(
        self,
        new_reader: Callable[[], AnswerReader],
        *,
        stream_id: str,
        model: str,
        fingerprint: str,
        hides_usage: bool = False,
        visual_usage: dict[str, int] | None = None,
    ) -> None:
        self._new_reader = new_reader
        self._readers: dict[int, AnswerReader] = {}
        self._head = {
            "id": stream_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._hides_usage = hides_usage
        self._visual_usage = visual_usage or {}
        self._usage_events: list[bytes] = []
        self._n_told: int | None = None
        self._n_pieces = 0
        self._rest = b""
        self._end: Literal["done", "failed"] | None = None

    @property
    def has_ended(self) -> bool:
        """The engine says no more; `check_end` tells whether all is well."""
        return self._end is not None

    @property
    def n_tokens(self) -> int:
        """Of the answer: as the engine told, which it does at its end; else the pieces of text,
        of which the engine sends about one a token."""
        return self._n_pieces if self._n_told is None else self._n_told

    def feed(self, chunk: bytes) -> bytes:
        # Only whole events are passed on: an error event may have to follow.
        *events, self._rest = (self._rest + chunk).split(_END)
        passed: list[bytes] = []
        for one in events:
            is_hidden = one.startswith(_PREFIX) and self._look_at(one[len(_PREFIX) :])
            if self._end is not None:
                break
            if not is_hidden:
                passed.append(one)
        if self._end == "done":
            passed += [*self._usage_events, self._grounding(), _LAST]
        return b"".join(one + _END for one in passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        if self._end != "done":
            how = "failed" if self._end == "failed" else "ended"
            raise EngineFailed(f"the engine {how} in the middle of the answer; send it again")

    def failure(self, error: MolmoError) -> bytes:
        """How a stream that has begun ends when it cannot go on."""
        return error_events(error)

    def _look_at(self, data: bytes) -> bool:
        """Take note of an event; whether it is not for the caller."""
        if data.strip() == b"[DONE]":
            self._end = "done"
            return False
        content = orjson.loads(data)
        if "error" in content:
            self._end = "failed"
            return False
        if usage := content.get("usage"):
            self._n_told = usage.get("completion_tokens")
        self._head["id"] = content.get("id", self._head["id"])
        self._head["created"] = content.get("created", self._head["created"])
        for choice in content.get("choices", ()):
            reader = self._readers.setdefault(choice["index"], self._new_reader())
            if text := choice["delta"].get("content"):
                reader.feed(text)
                self._n_pieces += 1
        is_usage = bool(usage) and not content.get("choices")
        if is_usage and self._visual_usage and not self._hides_usage:
            tell_visual_tokens(usage, self._visual_usage)
            self._usage_events = [_PREFIX + orjson.dumps(content)]
            return True
        return is_usage and self._hides_usage

    def _grounding(self) -> bytes:
        choices = [
            {
                "index": index,
                "delta": {"grounding": reader.close().model_dump(mode="json")},
                "finish_reason": None,
            }
            for index, reader in sorted(self._readers.items())
        ]
        return _PREFIX + orjson.dumps({**self._head, "choices": choices})
