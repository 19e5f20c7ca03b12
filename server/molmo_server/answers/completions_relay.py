"""The engine's stream of completions, passed on byte for byte.

Knows: events of OpenAI's completions. Does not know: where bytes come from or go.
"""

from __future__ import annotations

from typing import Any

from molmo_core.errors import MolmoError
from molmo_server.answers.events import END, LAST, error_events
from molmo_server.answers.splitting import EventSplitter


class CompletionsRelay:
    """Feed the engine's bytes, get the bytes for the caller, until `has_ended`."""

    def __init__(self, *, hides_usage: bool) -> None:
        self._events = EventSplitter()
        self._hides_usage = hides_usage
        self._usage: dict[str, Any] | None = None
        self._n_pieces = 0

    @property
    def has_ended(self) -> bool:
        return self._events.has_ended

    @property
    def n_tokens(self) -> int:
        """Of the answers: as the engine told at its end; else the pieces of text."""
        return self._n_pieces if self._usage is None else int(self._usage["completion_tokens"])

    @property
    def n_prompt_tokens(self) -> int | None:
        """As the engine told, which it does at its end."""
        return None if self._usage is None else int(self._usage["prompt_tokens"])

    def feed(self, chunk: bytes) -> bytes:
        passed: list[bytes] = []
        for event, content in self._events.feed(chunk):
            choices, usage = content.get("choices"), content.get("usage")
            if choices:
                self._n_pieces += 1
            elif usage:
                self._usage = usage
            if choices or not self._hides_usage:
                passed.append(event)
        if self._events.is_done:
            passed.append(LAST + END)
        return b"".join(passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        self._events.check_end()

    def failure(self, error: MolmoError) -> bytes:
        """How a stream that has begun ends when it cannot go on."""
        return error_events(error)
