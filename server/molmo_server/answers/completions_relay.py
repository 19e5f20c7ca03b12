"""The engine's stream of completions, passed on byte for byte.

Knows: events of OpenAI's completions. Does not know: where bytes come from or go.
"""

from __future__ import annotations

from molmo_core.errors import MolmoError
from molmo_server.answers.engine_events import EngineEvents
from molmo_server.answers.relay import error_events

_LAST = b"data: [DONE]\n\n"


class CompletionsRelay:
    """Feed the engine's bytes, get the bytes for the caller, until `has_ended`."""

    def __init__(self, *, hides_usage: bool) -> None:
        self._events = EngineEvents()
        self._hides_usage = hides_usage
        self._n_told: int | None = None
        self._n_pieces = 0

    @property
    def has_ended(self) -> bool:
        return self._events.has_ended

    @property
    def n_tokens(self) -> int:
        """Of the answers: as the engine told at its end; else the pieces of text."""
        return self._n_pieces if self._n_told is None else self._n_told

    def feed(self, chunk: bytes) -> bytes:
        passed: list[bytes] = []
        for event, content in self._events.feed(chunk):
            choices, usage = content.get("choices"), content.get("usage")
            if choices:
                self._n_pieces += 1
            elif usage:
                self._n_told = usage.get("completion_tokens")
            if choices or not self._hides_usage:
                passed.append(event)
        if self._events.is_done:
            passed.append(_LAST)
        return b"".join(passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        self._events.check_end()

    def failure(self, error: MolmoError) -> bytes:
        """How a stream that has begun ends when it cannot go on."""
        return error_events(error)
