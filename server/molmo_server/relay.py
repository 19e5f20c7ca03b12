"""The engine's event stream, passed on byte for byte, with the grounding added before its end.

Knows: server-sent events of OpenAI's chat stream. Does not know: where bytes come from or go.

Events are looked at (the text is needed for the grounding) and never written anew. Only `[DONE]`
is held back, and an event that tells of the engine's failure becomes an error of our own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
    """Feed the engine's bytes, get the bytes for the caller; `is_done` after its `[DONE]`."""

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
        self.is_done = False

    def feed(self, chunk: bytes) -> bytes:
        """Raises EngineFailed when the engine reports a failure inside the stream."""
        # Only whole events are passed on: an error event may have to follow.
        *events, self._rest = (self._rest + chunk).split(_END)
        for one in events:
            if one.startswith(_PREFIX):
                self._look_at(one[len(_PREFIX) :])
        if self.is_done:
            events = [*events[:-1], self._grounding(), _LAST]
        return b"".join(one + _END for one in events)

    def check_is_done(self) -> None:
        """Raises EngineFailed when the engine ended the stream without its `[DONE]`."""
        if not self.is_done:
            raise EngineFailed("the engine ended in the middle of the answer; send it again")

    def _look_at(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self.is_done = True
            return
        content = orjson.loads(data)
        if "error" in content:
            raise EngineFailed("the engine failed in the middle of the answer; send it again")
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
