"""The engine's event stream, passed on byte for byte, with the grounding added before its end.

Knows: server-sent events of OpenAI's chat stream. Does not know: where bytes come from or go.

Events are looked at (the text is needed for the grounding) and never written anew; one that is as
the one before it but for its text is not parsed. Only `[DONE]`
is held back, and an event that tells of the engine's failure becomes an error of our own. Where
usage is counted the engine is made to tell it, and that event is left out for callers who did not
ask for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from molmo_core.errors import EngineFailed, MolmoError
from molmo_server.answers.reading import AnswerReader
from molmo_server.errors import error_body

_PREFIX = b"data: "
_END = b"\n\n"
_LAST = _PREFIX + b"[DONE]"
_NOT_PLAIN = re.compile(rb'["\\\n]')
_TEXT = re.compile(rb'("delta":\{"content":")((?:[^"\\]|\\.)*)"\}')


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
        self._like: _TextEvent | None = None
        self._n_told: int | None = None
        self.n_prompt_tokens: int | None = None
        """As the engine told, which it does at its end."""
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
        if not self._rest and self._is_text_like_before(chunk):
            return chunk
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
            passed += [self._grounding(), _LAST]
        return b"".join(one + _END for one in passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        if self._end != "done":
            how = "failed" if self._end == "failed" else "ended"
            raise EngineFailed(f"the engine {how} in the middle of the answer; send it again")

    def _is_text_like_before(self, chunk: bytes) -> bool:
        """Whether it is one event that is as an earlier one but for its text; notes the text."""
        if self._like is None or (text := self._like.text_of(chunk)) is None:
            return False
        self._note_text(self._like.index, text)
        return True

    def _look_at(self, data: bytes) -> bool:
        """Take note of an event; whether it is not for the caller."""
        if data.strip() == b"[DONE]":
            self._end = "done"
            return False
        content = orjson.loads(data)
        self._like = _TextEvent.learn(data, content)
        if "error" in content:
            self._end = "failed"
            return False
        if usage := content.get("usage"):
            self._n_told = usage.get("completion_tokens")
            self.n_prompt_tokens = usage.get("prompt_tokens")
        self._head["id"] = content.get("id", self._head["id"])
        self._head["created"] = content.get("created", self._head["created"])
        for choice in content.get("choices", ()):
            self._note_text(choice["index"], choice["delta"].get("content") or "")
        return self._hides_usage and bool(usage) and not content.get("choices")

    def _note_text(self, index: int, text: str) -> None:
        if (reader := self._readers.get(index)) is None:
            reader = self._readers[index] = self._new_reader()
        if text:
            reader.feed(text)
            self._n_pieces += 1

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


@dataclass(frozen=True, kw_only=True)
class _TextEvent:
    """An event that brings text to one choice and nothing else: what stands around the text."""

    index: int
    before: bytes
    after: bytes

    @classmethod
    def learn(cls, data: bytes, content: dict[str, Any]) -> _TextEvent | None:
        """From an event and what it says; None when it is another kind of event."""
        choices = content.get("choices", ())
        if len(choices) != 1 or list(choices[0]["delta"]) != ["content"] or content.get("usage"):
            return None
        if (found := _TEXT.search(data)) is None:
            return None
        before, after = _PREFIX + data[: found.end(1)], data[found.end(2) :] + _END
        return cls(index=choices[0]["index"], before=before, after=after)

    def text_of(self, chunk: bytes) -> str | None:
        """Of one event of the same making; None for anything else, and for texts with escapes."""
        if not chunk.startswith(self.before) or not chunk.endswith(self.after):
            return None
        text = chunk[len(self.before) : -len(self.after)]
        return None if _NOT_PLAIN.search(text) else text.decode()
