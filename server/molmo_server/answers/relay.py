"""The engine's event stream, passed on byte for byte, with its places added as they are written,
and the whole grounding before its end.

Knows: what a caller of the chat stream gets. Does not know: where bytes come from or go.

Events are looked at (`events`: the text is needed for the grounding) and not written anew, but for
the one that tells the usage of a prompt with media. Only `[DONE]` is held back, and an event that
tells of the engine's failure becomes an error of our own. The engine is made to tell what was used,
and that event is left out for callers who did not ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import orjson

from molmo_core import api
from molmo_core.errors import MolmoError
from molmo_server.answers.events import END, LAST, PREFIX, EngineEvents, error_events, event
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.usage import tell_visual_tokens


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
        visual_usage: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._events = EngineEvents(new_reader)
        self.has_ended = False
        """The engine says no more; `check_end` tells whether all is well."""
        self._head = {
            "id": stream_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._hides_usage = hides_usage
        self._visual_usage = visual_usage

    @property
    def n_tokens(self) -> int:
        return self._events.n_tokens

    @property
    def n_prompt_tokens(self) -> int | None:
        return self._events.n_prompt_tokens

    def feed(self, chunk: bytes) -> bytes:
        observed = self._events.feed_text(chunk)
        if observed is not None:
            return b"".join((chunk, *map(self._added, observed))) if observed else chunk
        # Only whole events are passed on: an error event may have to follow.
        passed: list[bytes] = []
        for one in self._events.feed(chunk):
            if not one.is_usage:
                passed += (one.raw, END)
            elif not self._hides_usage:
                passed += (self._with_visual_usage(one.raw), END)
            if one.observed:
                passed += map(self._added, one.observed)
        self.has_ended = self._events.has_ended
        if self._events.end == "done":
            passed += (*self._grounding(), LAST, END)
        return b"".join(passed)

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        self._events.check_end()

    def failure(self, error: MolmoError) -> bytes:
        """How a stream that has begun ends when it cannot go on."""
        return error_events(error)

    def _with_visual_usage(self, raw: bytes) -> bytes:
        if not self._visual_usage:
            return raw
        content = orjson.loads(raw[len(PREFIX) :])
        tell_visual_tokens(content["usage"], self._visual_usage)
        return PREFIX + orjson.dumps(content)

    def _added(self, observed: tuple[int, api.Observation]) -> bytes:
        index, item = observed
        grounding = api.Added(item=item).model_dump(mode="json")
        return self._chunk([_choice(index, {"content": "", "grounding": grounding})])

    def _grounding(self) -> Iterable[bytes]:
        choices = []
        for index, reader in sorted(self._events.readers.items()):
            grounding = reader.close().model_dump(mode="json")
            yield from (self._added((index, item)) for item in reader.late)
            choices.append(_choice(index, {"grounding": grounding}))
        yield self._chunk(choices)

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event(orjson.dumps({**self._head, **self._events.identity, "choices": choices}))


def _choice(index: int, delta: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": None}
