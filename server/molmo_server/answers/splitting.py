"""The events of an engine's stream, whole, in whatever pieces its bytes come.

Knows: server-sent events as vLLM sends them. Does not know: what they say. (Of the chat, which is
the hot path, `events` does the same and reads the answers in one pass.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import orjson

from molmo_core.errors import EngineFailed
from molmo_server.answers.events import END, PREFIX


class EventSplitter:
    """Feed bytes, get `(event, content)` pairs until `has_ended`."""

    def __init__(self) -> None:
        self._rest = b""
        self._end: Literal["done", "failed"] | None = None

    @property
    def has_ended(self) -> bool:
        """The engine says no more; `check_end` tells whether all is well."""
        return self._end is not None

    @property
    def is_done(self) -> bool:
        return self._end == "done"

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Whole events with their ends, and what they hold; neither `[DONE]` nor failures."""
        *events, self._rest = (self._rest + chunk).split(END)
        for one in events:
            if not one.startswith(PREFIX):
                continue
            data = one[len(PREFIX) :]
            if data.strip() == b"[DONE]":
                self._end = "done"
                return
            if (content := _content(data)) is None:
                self._end = "failed"
                return
            yield one + END, content

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        if self._end != "done":
            how = "failed" if self._end == "failed" else "ended"
            raise EngineFailed(f"the engine {how} in the middle of the answer; send it again")


def _content(data: bytes) -> dict[str, Any] | None:
    """What an event holds; None of one that tells of a failure, or is no JSON object."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return content if isinstance(content, dict) and "error" not in content else None
