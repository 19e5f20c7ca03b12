"""The inside of one `coords` attribute: groups of a frame and its `id x y` triples.

Knows: which numbers make an observation, and what to keep when some do not. Does not know: tags.
A triple counts as soon as a character that is no digit follows its y: `100` may become `1000`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from molmo_core.points.grounding import PER_MILLE, Kind, Media, Point, WarningCode

_DIGITS = "0123456789"
_GROUP_SEPARATORS = ";\t:,"  # the training code reads all four, and writes `;` or a tab
_MAX_TOKEN_CHARS = 9
_COORDINATE_CHARS = 3  # padded with zeros; 1000 alone has four
_CUT_OR_COMPLETE = "100"  # at the end of a text: 100, or 1000 without its last digit

Problem = tuple[WarningCode, str]
Field = Literal["frame", "id", "x", "y"]
_FIELD_AFTER: dict[Field, Field] = {"frame": "id", "id": "x", "x": "y", "y": "id"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaBounds:
    """What the prompt held. `n_media` counts images; a video has one time line."""

    media: Media
    n_media: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    media_index: int
    time_s: float | None


class CoordsScanner:
    """`begin`, then `read` each character, then `end_of_attribute` or `end_of_text`.

    Observations go into the list given to `begin` and into `completed`.
    """

    def __init__(
        self, bounds: MediaBounds, warn: Callable[[WarningCode, str, tuple[int, int]], None]
    ) -> None:
        self.completed: list[Point] = []
        self._bounds = bounds
        self._warn = warn
        self._places: set[tuple[Frame, int, int]] = set()  # of points, over the whole text
        self.begin("point", [])

    def begin(self, kind: Kind, points: list[Point]) -> None:
        self._kind = kind
        self._points = points
        self._times_s: set[float] = set()
        self._latest_time_s = 0.0
        self._tracked: set[tuple[Frame, int]] = set()
        self._has_line_break = False
        self._token = ""
        self._token_start = 0
        self._begin_group()

    def _begin_group(self) -> None:
        self._field: Field = "frame"
        self._frame: Frame | None = None
        self._begin_triple(0)

    def _begin_triple(self, start: int) -> None:
        self._start = start
        self._values: list[int] = []  # id, x, y as far as read and valid
        self._problem: Problem | None = None

    def read(self, char: str, position: int) -> None:
        if char in _GROUP_SEPARATORS:
            self._end_group(position)
        elif char.isspace():
            self._end_token(position)
            if char != " " and not self._has_line_break:
                self._has_line_break = True
                span = (position, position + 1)
                self._warn("malformed_tag", "line break inside coords, read as a space", span)
        else:
            if not self._token:
                self._token_start = position
            if len(self._token) <= _MAX_TOKEN_CHARS:  # one more than allowed marks it too long
                self._token += char

    def end_of_attribute(self, position: int) -> None:
        self._end_group(position)

    def end_of_text(self, position: int) -> None:
        """Keep the last triple if no further digit could change it."""
        is_whole = len(self._token) >= _COORDINATE_CHARS and self._token != _CUT_OR_COMPLETE
        if self._field == "y" and is_whole:
            self._end_token(position)

    def _end_group(self, end: int) -> None:
        self._end_token(end)
        if self._field in ("x", "y"):
            span = (self._start, end)
            self._warn("malformed_coordinates", "a group ends inside a triple", span)
        self._begin_group()

    def _end_token(self, end: int) -> None:
        token, self._token = self._token, ""
        if not token:
            return
        field, start = self._field, self._token_start
        if field == "y" and self._looks_like_next_id(token):
            span = (self._start, start)
            self._warn("malformed_coordinates", "a triple has only two numbers", span)
            field = "id"
        self._field = _FIELD_AFTER[field]
        if field == "frame":
            self._frame = self._read_frame(token, (start, end))
            return
        if field == "id":
            self._begin_triple(start)
        problem = _id_problem(token) if field == "id" else _coordinate_problem(token)
        if problem is None:
            self._values.append(int(token))
        self._problem = self._problem or problem
        if field == "y":
            self._end_triple((self._start, end))

    def _looks_like_next_id(self, token: str) -> bool:
        """Whether y is missing: y has three digits, ids count up by one."""
        is_short = len(token) < _COORDINATE_CHARS and _is_digits(token)
        return is_short and self._problem is None and int(token) == self._values[0] + 1

    def _read_frame(self, token: str, span: tuple[int, int]) -> Frame | None:
        whole, _, fraction = token.partition(".")
        if len(token) > _MAX_TOKEN_CHARS or not _is_digits(whole + fraction):
            message = f"a group begins with {token!r} instead of an image number or seconds"
            self._warn("malformed_coordinates", message, span)
            return None
        value = float(token)
        if self._bounds.media == "video":
            self._check_time(value, span)
            return Frame(media_index=0, time_s=value)
        if not (value.is_integer() and 1 <= value <= self._bounds.n_media):
            message = f"image number {token}: the prompt has {self._bounds.n_media} images"
            self._warn("bad_media_index", message, span)
            return None
        return Frame(media_index=int(value) - 1, time_s=None)

    def _check_time(self, time_s: float, span: tuple[int, int]) -> None:
        if time_s in self._times_s:
            self._warn("repeated_time", f"{time_s} s stands twice; merged", span)
        elif time_s < self._latest_time_s:
            message = f"{time_s} s stands after {self._latest_time_s} s"
            self._warn("time_not_monotonic", message, span)
        self._times_s.add(time_s)
        self._latest_time_s = max(time_s, self._latest_time_s)

    def _end_triple(self, span: tuple[int, int]) -> None:
        if self._problem is not None:
            code, message = self._problem
            self._warn(code, f"{message}; the triple is dropped", span)
        elif self._frame is not None and not self._is_second_sighting(self._frame, span):
            self._keep(self._frame, span)
        self._begin_triple(span[1])

    def _is_second_sighting(self, frame: Frame, span: tuple[int, int]) -> bool:
        """Note what was seen; True for an object that this frame of the track has already."""
        object_id, x, y = self._values
        if self._kind == "point":
            if (frame, x, y) in self._places:
                self._warn("duplicate_point", "the same place again; kept", span)
            self._places.add((frame, x, y))
            return False
        if (frame, object_id) in self._tracked:
            message = f"object {object_id} stands twice in a frame; the first is kept"
            self._warn("duplicate_id", message, span)
            return True
        self._tracked.add((frame, object_id))
        return False

    def _keep(self, frame: Frame, span: tuple[int, int]) -> None:
        object_id, x, y = self._values
        point = Point(
            x=x / PER_MILLE,
            y=y / PER_MILLE,
            id=object_id,
            media_index=frame.media_index,
            time_s=frame.time_s,
            label=None,
            alt=None,
            kind=self._kind,
            span=span,
        )
        self._points.append(point)
        self.completed.append(point)


def _id_problem(token: str) -> Problem | None:
    if _is_digits(token) and len(token) <= _MAX_TOKEN_CHARS:
        return None
    return "malformed_coordinates", f"{token!r} is not an id"


def _coordinate_problem(token: str) -> Problem | None:
    if not _is_digits(token):
        return "malformed_coordinates", f"{token!r} is not a coordinate"
    if len(token) < _COORDINATE_CHARS:
        return "short_coordinate", f"{token!r} has fewer than three digits"
    if len(token) > _COORDINATE_CHARS + 1 or int(token) > PER_MILLE:
        return "out_of_range", f"{token} is above {PER_MILLE}"
    return None


def _is_digits(token: str) -> bool:
    return bool(token) and all(char in _DIGITS for char in token)
