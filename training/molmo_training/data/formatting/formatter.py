"""A dataset's row → an `Example`: branches of turns about the media.

A row is one question, or a tree of them: `message_list` holds a row for each branch.
A conversation is `multi_turn_messages` (a row for each question) or `messages` (the turns as
they are: texts in turn, or {role, content}). `weight` is a factor on the loss, or
{weight, root_subsegments, root_length}; a branch's is multiplied by its row's.
Knows: conversations, prefixes, weights, guards. Does not know: files, tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from molmo_core.errors import InvalidExample
from molmo_core.prompts import Subtitle, Turn
from molmo_core.tokens import find_control_token
from molmo_training.data.example import Branch, Example
from molmo_training.data.formatting.counting_guard import guard_counting
from molmo_training.data.formatting.media import TEXT_ONLY, RowMedia
from molmo_training.data.formatting.questions import ask
from molmo_training.data.formatting.row import (
    Row,
    flag,
    invalid,
    items,
    number,
    optional_number,
    optional_text,
    rows,
    text,
)
from molmo_training.data.formatting.settings import FormatSettings
from molmo_training.data.formatting.style_prefix import style_prefix, trained_style, with_prefix


@dataclass(frozen=True, kw_only=True)
class LossWeight:
    """How a branch counts in the loss; None leaves it to `Tokenizing`."""

    factor: float = 1.0
    root_subsegments: bool | None = None
    root_length: bool | None = None

    def within(self, outer: LossWeight) -> LossWeight:
        """Factors multiply; what is said closer to the branch wins."""
        return LossWeight(
            factor=self.factor * outer.factor,
            root_subsegments=_first(self.root_subsegments, outer.root_subsegments),
            root_length=_first(self.root_length, outer.root_length),
        )


UNCHANGED = LossWeight()

MOST_OBJECTS = 62
"""The highest number that a marked object may have."""

SHARED_FIELDS = (
    "style",
    "point_scale",
    "width",
    "height",
    "clip_points",
    "sampling_fps",
    "guard_counting",
)
"""What a row says for all rows inside it that do not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Formatter:
    """Formats rows of one dataset; all that varies is drawn from the generator given with each."""

    settings: FormatSettings
    weight: LossWeight = UNCHANGED
    """Of the whole dataset, as a mixture sets it."""

    def __call__(self, row: Row, rng: np.random.Generator, media: RowMedia = TEXT_ONLY) -> Example:
        """Raises InvalidExample for a row that cannot be used, naming the field at fault."""
        if len(media.images) and len(media.frames):
            raise InvalidExample("a row has images and a video: give one or the other")
        branches = [self._branch(row, part, media, rng) for part in _parts(row)]
        order = rng.permutation(len(branches))
        return Example(
            branches=tuple(branches[int(k)] for k in order),
            images=media.images,
            frames=media.frames,
            frame_times_s=media.frame_times_s,
            subtitles=_subtitles(row),
        )

    def _branch(self, row: Row, part: Row, media: RowMedia, rng: np.random.Generator) -> Branch:
        messages = self._messages(part, media, rng)
        style = _style_of(part)
        if style is not None:
            style = trained_style(style, self.settings)
            prefix = style_prefix(
                style, n_answer_chars=len(messages[-1]), settings=self.settings, rng=rng
            )
            messages[0] = with_prefix(prefix, messages[0])
        _refuse_control_tokens(messages)
        turns = tuple(
            Turn(role="assistant" if k % 2 else "user", text=message)
            for k, message in enumerate(messages)
        )
        weight = _weight(part)
        if part is not row:
            weight = weight.within(_weight(row))
        weight = weight.within(self.weight)
        return Branch(
            turns=turns,
            weight=weight.factor,
            root_subsegments=weight.root_subsegments,
            root_length=weight.root_length,
            about=_about(part),
        )

    def _messages(self, part: Row, media: RowMedia, rng: np.random.Generator) -> list[str]:
        """Questions and answers in turn."""
        if part.get("messages") is not None:
            messages = _given_messages(part)
        else:
            asked = [part]
            if part.get("multi_turn_messages") is not None:
                asked = _inherit(part, "multi_turn_messages")
            messages = [piece for one in asked for piece in ask(one, media, self.settings, rng)]
        if flag(part, "guard_counting"):
            messages[::2] = [guard_counting(question, rng) for question in messages[::2]]
        return messages


def _about(part: Row) -> tuple[int, ...]:
    """The marked objects that the answer is about, of rows that have `objects`."""
    if part.get("about") is None:
        return ()
    numbers = [int(n) if isinstance(n, Integral) else -1 for n in items(part, "about")]
    if not all(0 <= n <= MOST_OBJECTS for n in numbers):
        raise invalid(part, "about", f"numbers of objects, from 0 to {MOST_OBJECTS}")
    return tuple(numbers)


def _parts(row: Row) -> Sequence[Row]:
    return [row] if row.get("message_list") is None else _inherit(row, "message_list")


def _inherit(row: Row, field: str) -> list[Row]:
    """The rows in a field, with what the row that holds them says for all."""
    found = rows(row, field)
    if not found:
        raise invalid(row, field, "at least one row")
    shared = {name: row[name] for name in SHARED_FIELDS if row.get(name) is not None}
    return [{**shared, **{k: v for k, v in one.items() if v is not None}} for one in found]


def questions_of(row: Row) -> Iterator[Row]:
    """The row's questions, each with what the rows around it say for all. Raises InvalidExample."""
    field = next((f for f in ("message_list", "multi_turn_messages") if row.get(f) is not None), "")
    if not field:
        yield row
        return
    for one in _inherit(row, field):
        yield from questions_of(one)


def _style_of(part: Row) -> str | None:
    """The style of the first question; conversations as they are may have none."""
    if part.get("multi_turn_messages") is not None:
        return text(_inherit(part, "multi_turn_messages")[0], "style")
    return optional_text(part, "style")


def _given_messages(part: Row) -> list[str]:
    messages = []
    for index, message in enumerate(items(part, "messages")):
        role = "assistant" if index % 2 else "user"
        content: Any = message
        if isinstance(message, Mapping):
            content = message.get("content") if message.get("role") == role else None
        if not isinstance(content, str):
            raise invalid(
                part, "messages", "texts, user and assistant in turn, beginning with the user"
            )
        messages.append(content)
    if not messages or len(messages) % 2:
        raise invalid(part, "messages", "an answer to each question")
    return messages


def _refuse_control_tokens(messages: Sequence[str]) -> None:
    for message in messages:
        token = find_control_token(message)
        if token is not None:
            raise InvalidExample(
                f"the text of a row contains the control token {token!r}: take it out"
            )


def _weight(row: Row) -> LossWeight:
    given = row.get("weight")
    if not isinstance(given, Mapping):
        factor = optional_number(row, "weight")
        return LossWeight(factor=_positive(row, 1.0 if factor is None else factor))
    unknown = set(given) - {"weight", "root_subsegments", "root_length"}
    if unknown:
        raise invalid(row, "weight", "a number, or {weight, root_subsegments, root_length}")
    factor = optional_number(given, "weight")
    return LossWeight(
        factor=_positive(row, 1.0 if factor is None else factor),
        root_subsegments=_optional_flag(given, "root_subsegments"),
        root_length=_optional_flag(given, "root_length"),
    )


def _optional_flag(row: Row, field: str) -> bool | None:
    return None if row.get(field) is None else flag(row, field)


def _positive(row: Row, factor: float) -> float:
    if not 0 < factor < float("inf"):
        raise invalid(row, "weight", "a weight above 0")
    return factor


def _first(inner: bool | None, outer: bool | None) -> bool | None:
    return outer if inner is None else inner


def _subtitles(row: Row) -> tuple[Subtitle, ...]:
    if row.get("subtitles") is None:
        return ()
    return tuple(
        Subtitle(
            start_s=number(line, "start_s"), end_s=number(line, "end_s"), text=text(line, "text")
        )
        for line in rows(row, "subtitles")
    )
