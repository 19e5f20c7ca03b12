"""The engine's event stream, looked at event by event while its answers are read.

Knows: server-sent events of OpenAI's chat stream. Does not know: where bytes come from, what is
passed on of them (`relay`, the verbs).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from molmo_core import api
from molmo_core.errors import EngineFailed, MolmoError
from molmo_server.answers.reading import AnswerReader
from molmo_server.errors import error_body

PREFIX = b"data: "
END = b"\n\n"
LAST = PREFIX + b"[DONE]"
_NO_CHUNK = (orjson.JSONDecodeError, AttributeError, IndexError, KeyError, TypeError)
"""What reading something else than a chunk of a completion raises."""
_NOT_PLAIN = re.compile(rb'["\\\n]')
_NOT_PROSE = re.compile(rb'["\\\n<]')
_TEXT = re.compile(rb'("delta":\{"content":")((?:[^"\\]|\\.)*)"\}')


Observed = tuple[tuple[int, api.Observation], ...]
"""Places that were completed, with the index of their choice."""


def event(data: bytes) -> bytes:
    return PREFIX + data + END


def error_events(error: MolmoError) -> bytes:
    """How a stream that has begun ends when it cannot go on."""
    return event(error_body(error)) + LAST + END


@dataclass(slots=True)
class EngineEvent:
    """One event as it came, without what ends it."""

    raw: bytes
    observed: Observed = ()
    is_usage: bool = False
    """It tells what was used, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class TextEvent:
    """An event that brings text to one choice and nothing else: what stands around the text."""

    index: int
    before: bytes
    after: bytes

    @classmethod
    def learn(cls, data: bytes, content: dict[str, Any]) -> TextEvent | None:
        """From an event and what it says; None when it is another kind of event."""
        choices: list[dict[str, Any]] = content.get("choices") or []
        if len(choices) != 1 or content.get("usage"):
            return None
        choice = choices[0]
        if list(choice["delta"]) != ["content"]:
            return None
        if choice.get("finish_reason") or choice.get("logprobs"):
            return None
        if (found := _TEXT.search(data)) is None:
            return None
        before, after = PREFIX + data[: found.end(1)], data[found.end(2) :] + END
        return cls(index=choice["index"], before=before, after=after)

    def text_of(self, chunk: bytes) -> bytes | None:
        """Of one event of the same making; None for anything else."""
        if chunk.startswith(self.before) and chunk.endswith(self.after):
            return chunk[len(self.before) : -len(self.after)]
        return None


class EngineEvents:
    """Feed the engine's bytes, get its events, until `has_ended`."""

    def __init__(self, new_reader: Callable[[], AnswerReader]) -> None:
        self._new_reader = new_reader
        self.readers: dict[int, AnswerReader] = {}
        """By index of the choice."""
        self.identity: dict[str, Any] = {}
        """`id` and `created` of the stream."""
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        """Of the choice that ended last."""
        self.end: Literal["done", "failed"] | None = None
        self._like: TextEvent | None = None
        """The last event that was of this kind; one alike is not parsed."""
        self._n_pieces = 0
        self._rest = b""

    @property
    def has_ended(self) -> bool:
        """The engine says no more; `check_end` tells whether all is well."""
        return self.end is not None

    @property
    def n_tokens(self) -> int:
        """Of the answer: as the engine told, which it does at its end; else the pieces of text,
        of which the engine sends about one a token."""
        told = (self.usage or {}).get("completion_tokens")
        return self._n_pieces if told is None else int(told)

    @property
    def n_prompt_tokens(self) -> int | None:
        """As the engine told, which it does at its end."""
        return (self.usage or {}).get("prompt_tokens")

    def feed_text(self, chunk: bytes) -> Observed | None:
        """What a chunk completes that is one event like the last one, with another text; None when
        it is anything else, and was not fed."""
        return None if self._rest else self._read_alike(chunk)

    def _read_alike(self, chunk: bytes) -> Observed | None:
        like = self._like
        if like is None or (text := like.text_of(chunk)) is None:
            return None
        if text.isascii() and not _NOT_PROSE.search(text):
            self._n_pieces += bool(text)
            return self._completed(like.index, self.reader(like.index).feed_prose(text))
        if _NOT_PLAIN.search(text):
            return None
        try:
            return self._read(like.index, text.decode(), None)
        except UnicodeDecodeError:  # nor is it JSON
            return None

    def feed(self, chunk: bytes) -> Iterator[EngineEvent]:
        """Whole events; that of the end, and of a failure, is not among them."""
        *events, self._rest = (self._rest + chunk).split(END)
        for raw in events:
            found = EngineEvent(raw)
            if (observed := self._read_alike(raw + END)) is not None:
                found.observed = observed
            elif raw.startswith(PREFIX):
                try:
                    self._look_at(raw[len(PREFIX) :], found)
                except _NO_CHUNK:
                    self.end = "failed"
                if self.end is not None:
                    return
            yield found

    def check_end(self) -> None:
        """Raises EngineFailed when the engine reported a failure, or ended without `[DONE]`."""
        if self.end != "done":
            how = "failed" if self.end == "failed" else "ended"
            raise EngineFailed(f"the engine {how} in the middle of the answer; send it again")

    def reader(self, index: int) -> AnswerReader:
        """Of one choice."""
        found = self.readers.get(index)
        if found is None:
            found = self.readers[index] = self._new_reader()
        return found

    def _look_at(self, data: bytes, found: EngineEvent) -> None:
        if data.strip() == b"[DONE]":
            self.end = "done"
            return
        content = orjson.loads(data)
        if "error" in content:
            self.end = "failed"
            return
        self._like = TextEvent.learn(data, content)
        choices = content.get("choices") or ()
        if usage := content.get("usage"):
            self.usage = usage
            found.is_usage = not choices
        if not self.identity:
            self.identity = {k: content[k] for k in ("id", "created") if k in content}
        for choice in choices:
            self._look_at_choice(choice, found)

    def _look_at_choice(self, choice: dict[str, Any], found: EngineEvent) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        tokens = (choice.get("logprobs") or {}).get("content")
        text = choice["delta"].get("content") or ""
        found.observed += self._read(choice["index"], text, tokens)

    def _read(self, index: int, text: str, tokens: list[dict[str, Any]] | None) -> Observed:
        reader = self.reader(index)
        if not text and not tokens:  # tokens may come before their text
            return ()
        self._n_pieces += bool(text)
        return self._completed(index, reader.feed(text, tokens))

    def _completed(self, index: int, observed: list[api.Observation]) -> Observed:
        return tuple((index, item) for item in observed) if observed else ()
