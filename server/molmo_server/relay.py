"""The engine's event stream, passed on byte for byte, with the grounding added before its end.

Knows: server-sent events of OpenAI's chat stream. Does not know: where bytes come from or go.

Events are looked at (the text is needed for the grounding) and never written anew. Only `[DONE]`
is held back, and an event that tells of the engine's failure becomes an error of our own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import orjson

from molmo_core.errors import EngineFailed, MolmoError
from molmo_server.errors import error_body
from molmo_server.grounding import AnswerReader

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
        self._rest = b""
        self._end: Literal["done", "failed"] | None = None

    @property
    def has_ended(self) -> bool:
        """The engine says no more; `check_end` tells whether all is well."""
        return self._end is not None

    def feed(self, chunk: bytes) -> bytes:
        # Only whole events are passed on: an error event may have to follow.
        *events, self._rest = (self._rest + chunk).split(_END)
        passed: list[bytes] = []
        for one in events:
            if one.startswith(_PREFIX):
                self._look_at(one[len(_PREFIX) :])
            if self._end is not None:
                break
            passed.append(one)
        if self._end == "done":
            passed += [self._grounding(), _LAST]
        return b"".join(one + _END for one in passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        if self._end != "done":
            how = "failed" if self._end == "failed" else "ended"
            raise EngineFailed(f"the engine {how} in the middle of the answer; send it again")

    def _look_at(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self._end = "done"
            return
        content = orjson.loads(data)
        if "error" in content:
            self._end = "failed"
            return
        self._head["id"] = content.get("id", self._head["id"])
        self._head["created"] = content.get("created", self._head["created"])
        for choice in content.get("choices", ()):
            reader = self._readers.setdefault(choice["index"], self._new_reader())
            if text := choice["delta"].get("content"):
                reader.feed(text)

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
