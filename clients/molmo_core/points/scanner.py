"""From characters to tags, one character after the other.

Knows: where a tag, its attributes and its label begin and end, and attribute quoting. Does not
know: the text of labels (it keeps offsets only, so that nothing is copied while streaming), what
stands inside `coords` (the coords module), counts, older formats.
Every character is looked at a bounded number of times, whatever the text and the chunks.

Grammar, as trained (`;` is a tab in the older html-v1):

    <points[ alt="TEXT"] coords="GROUP(;GROUP)*">LABEL</points>       and the same with <tracks
    GROUP := FRAME( ID X Y)+     FRAME: image number from 1, or seconds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from molmo_core.points.coords import CoordsScanner, MediaBounds
from molmo_core.points.grounding import GroundingWarning, Kind, Point, WarningCode

MAX_HEAD_CHARS = 4096
"""A tag without coordinates after so many characters is prose that looks like a tag."""

_KIND_BY_NAME: dict[str, Kind] = {
    "points": "point",
    "point": "point",
    "tracks": "track",
    "track": "track",
}
_LONGEST_NAME = len("/points")
_LONGEST_ATTRIBUTE = 16  # more than `coords=`: a longer word keeps its tail and never equals it
_CLOSING_NAMES = frozenset(f"/{name}" for name in _KIND_BY_NAME)
_CLOSING_TAILS = ("</points", "</tracks")
_ESCAPE_HINT = "escape quotes inside alt as &quot;"

Step = Callable[[str, int], int]


@dataclass(kw_only=True, slots=True)
class ScannedTag:
    """One tag that has coordinates. Spans are offsets into the whole text, end exclusive."""

    kind: Kind
    start: int
    end: int = 0
    alt_span: tuple[int, int] | None = None
    label_span: tuple[int, int] | None = None
    is_closed: bool = False
    points: list[Point] = field(default_factory=list)


class TagScanner:
    """Feed text; tags and warnings grow. `finish` says that no more text comes."""

    def __init__(self, bounds: MediaBounds) -> None:
        self.tags: list[ScannedTag] = []
        self.warnings: list[GroundingWarning] = []
        self._coords = CoordsScanner(bounds, self._warn)
        self._offset = 0  # of the chunk in the text
        self._step: Step = self._in_text
        self._name = ""
        self._name_start = 0
        self._tag = ScannedTag(kind="point", start=0)  # the one being read, if `_is_open`
        self._is_open = False
        self._has_coords = False
        self._label_start: int | None = None  # None before the label
        self._word = ""
        self._quote = ""
        self._quote_depth = 0
        self._value_tail = ""
        self._value_is_alt = False

    def feed(self, text: str) -> list[Point]:
        """Return the observations that `text` completes."""
        completed = self._coords.completed = []
        index = 0
        while index < len(text):
            index = self._step(text, index)
        self._offset += len(text)
        return completed

    @property
    def is_in_prose(self) -> bool:
        """Only a `<` can change what the scanner is at."""
        return self._step == self._in_text

    def finish(self) -> list[Point]:
        """Close what the end of the text leaves open; return observations completed by it."""
        end = self._offset
        completed = self._coords.completed = []
        if self._label_start is not None:
            label_end = self._name_start if self._ends_inside_closing_tag() else end
            self._end_unclosed_label(label_end, end)
        elif self._is_open:
            if self._step == self._in_coords:
                self._coords.end_of_text(end)
            self._warn("truncated", "the text ends inside a tag", (self._tag.start, end))
            self._end_tag(end, is_closed=False)
        elif self._step == self._in_name and self._name.lower() in _KIND_BY_NAME:
            self._warn("truncated", "the text ends inside a tag", (self._name_start, end))
        return completed

    def _warn(self, code: WarningCode, message: str, span: tuple[int, int]) -> None:
        self.warnings.append(GroundingWarning(code=code, message=message, span=span))

    # Steps: read from `text[index]` on, return the index of the next character to read.

    def _in_text(self, text: str, index: int) -> int:
        found = text.find("<", index)
        if found < 0:
            return len(text)
        self._name = ""
        self._name_start = self._offset + found
        self._step = self._in_name
        return found + 1

    def _in_name(self, text: str, index: int) -> int:
        char = text[index]
        is_name_char = char.isascii() and (char.isalpha() or (char == "/" and not self._name))
        if is_name_char and len(self._name) < _LONGEST_NAME:
            self._name += char
            return index + 1
        is_in_label = self._label_start is not None
        name = self._name.lower()
        if name in _KIND_BY_NAME and char.isspace():
            if is_in_label:
                self._end_unclosed_label(self._name_start, self._name_start)
            self._open_tag(name)
        elif name in _CLOSING_NAMES and is_in_label and (char == ">" or char.isspace()):
            self._close_label(name)
            self._step = self._in_closing_tag
        else:
            self._step = self._in_text
        return index  # the character belongs to the next step

    def _in_head(self, text: str, index: int) -> int:
        char, position = text[index], self._offset + index
        if char == "<" or (not self._has_coords and position - self._tag.start > MAX_HEAD_CHARS):
            self._abandon(position, 'coords="…"> is missing')
            return index
        if char == ">":
            self._end_head(position + 1)
        elif char in "\"'" and self._word.endswith("="):
            self._open_value(char, position + 1)
        elif char in "\"'":
            if self._tag.alt_span is not None and not self._has_coords:
                # An unescaped quote had ended alt too early.
                self._tag.alt_span = (self._tag.alt_span[0], position)
            self._word = ""
        elif char.isspace():
            self._word = ""
        else:
            self._word = (self._word + char)[-_LONGEST_ATTRIBUTE:]
        return index + 1

    def _in_value(self, text: str, index: int) -> int:
        char, position = text[index], self._offset + index
        self._value_tail = (self._value_tail + char)[-len(_CLOSING_TAILS[0]) :]
        is_runaway = not self._has_coords and position - self._tag.start > MAX_HEAD_CHARS
        if is_runaway or self._value_tail.lower() in _CLOSING_TAILS:
            self._abandon(position, f"an attribute is not closed; {_ESCAPE_HINT}")
            return index + 1
        if char == self._quote:
            # `coords="` written inside alt opens an inner quotation, it does not end alt.
            opens = self._value_tail.endswith("=" + char)
            self._quote_depth += 1 if opens else -1
            if self._quote_depth == 0:
                if self._value_is_alt and self._tag.alt_span is not None:
                    self._tag.alt_span = (self._tag.alt_span[0], position)
                self._step = self._in_head
        return index + 1

    def _in_coords(self, text: str, index: int) -> int:
        char, position = text[index], self._offset + index
        if char == self._quote or char in "<>":
            self._coords.end_of_attribute(position)
            self._step = self._in_head
            if char != self._quote:
                self._warn("malformed_tag", "coords has no closing quote", (position, position))
                return index
        else:
            self._coords.read(char, position)
        return index + 1

    def _in_closing_tag(self, text: str, index: int) -> int:
        found = text.find(">", index)
        if found < 0:
            return len(text)
        self._end_tag(self._offset + found + 1, is_closed=True)
        return found + 1

    # Transitions

    def _open_tag(self, name: str) -> None:
        self._tag = ScannedTag(kind=_KIND_BY_NAME[name], start=self._name_start)
        if self._name not in ("points", "tracks"):
            self._warn(
                "malformed_tag",
                f"<{self._name}> is read as <{self._tag.kind}s>",
                (self._name_start, self._name_start + 1 + len(self._name)),
            )
        self._is_open, self._has_coords = True, False
        self._word = ""
        self._step = self._in_head

    def _open_value(self, quote: str, start: int) -> None:
        name = self._word[:-1].lower()
        self._word, self._quote, self._quote_depth, self._value_tail = "", quote, 1, ""
        if name == "coords" and not self._has_coords:
            self._has_coords = True
            self._coords.begin(self._tag.kind, self._tag.points)
            self._step = self._in_coords
            return
        self._value_is_alt = name == "alt" and self._tag.alt_span is None
        if self._value_is_alt:
            self._tag.alt_span = (start, start)
        self._step = self._in_value

    def _end_head(self, end: int) -> None:
        if not self._has_coords:
            self._abandon(end, "the tag has no coords")
        elif self._word.endswith("/"):
            self._end_tag(end, is_closed=True)
        else:
            self._label_start = end
            self._step = self._in_text  # a label is text, of an open tag

    def _end_label(self, end: int) -> None:
        if self._label_start is not None:
            self._tag.label_span = (self._label_start, end)

    def _close_label(self, name: str) -> None:
        self._end_label(self._name_start)
        if _KIND_BY_NAME[name[1:]] != self._tag.kind:
            span = (self._name_start, self._name_start + 1 + len(name))
            self._warn("malformed_tag", f"<{self._tag.kind}s> is closed by <{name}>", span)

    def _end_unclosed_label(self, label_end: int, end: int) -> None:
        self._end_label(label_end)
        span = (self._tag.start, end)
        self._warn("unclosed_tag", f"</{self._tag.kind}s> is missing", span)
        self._end_tag(end, is_closed=False)

    def _end_tag(self, end: int, *, is_closed: bool) -> None:
        self._tag.end, self._tag.is_closed = end, is_closed
        if self._has_coords:
            self.tags.append(self._tag)
        self._is_open, self._label_start = False, None
        self._step = self._in_text

    def _abandon(self, position: int, reason: str) -> None:
        self._warn("malformed_tag", reason, (self._tag.start, position))
        self._end_tag(position, is_closed=False)

    def _ends_inside_closing_tag(self) -> bool:
        names = (*_CLOSING_NAMES, *_KIND_BY_NAME)
        return self._step == self._in_closing_tag or (
            self._step == self._in_name
            and any(name.startswith(self._name.lower()) for name in names)
        )
