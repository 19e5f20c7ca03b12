"""What an answer points at: points, tracks, counts, and what was wrong with the text.

Knows: normalised coordinates and offsets into the answer. Does not know: how text is read or
written. Source: the grounding part of the serving specification.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from typing import Literal

Media = Literal["image", "video"]
Kind = Literal["point", "track"]
WarningCode = Literal[
    "truncated",  # the text ends inside a tag; its complete triples are kept
    "unclosed_tag",  # the closing tag is missing; the label is what stood on the line
    "malformed_tag",  # upper case, line break, missing quote: read all the same, or skipped
    "malformed_coordinates",  # part of the coordinates is no triple; that part is dropped
    "short_coordinate",  # one or two digits: a digit is lost; the triple is dropped
    "out_of_range",  # a coordinate above 1000; the triple is dropped
    "bad_media_index",  # an image number that does not exist; its triples are dropped
    "duplicate_point",  # the same place of the same picture again; kept
    "duplicate_id",  # an object twice at one moment; the first is kept
    "repeated_time",  # a second group with the same time; merged
    "time_not_monotonic",  # groups not in order of time; kept
    "count_mismatch",  # the sentence declares another number than was pointed at
    "over_max_points",  # more than were asked for; the first ones are kept
    "legacy_format",  # read as the format of an older model
]

PER_MILLE = 1000
"""Coordinates are written in thousandths of the width and of the height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One observation of one object.

    `x`, `y` are 0 to 1, origin top left; 1.0 is the far edge, one past the last pixel. `id` is the
    model's. `media_index` counts images from 0 and is 0 for video; `time_s` is None for images.
    `label` and `alt` are None while streaming: the label follows the coordinates.
    `span` holds the offsets of the triple in the text, end exclusive.
    """

    x: float
    y: float
    id: int
    media_index: int
    time_s: float | None
    label: str | None
    alt: str | None
    kind: Kind
    span: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One object over time; `points` are in order of time, one a moment."""

    id: int
    label: str | None
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundingWarning:
    code: WarningCode
    message: str
    span: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grounding:
    """Everything that one answer says about places.

    `points` come from `<points>` in order of the text, `tracks` from `<tracks>`, one per label and
    id. `count` is the number of points plus the number of tracks; `declared_count` is the number
    that the sentence states, None when it states none. `is_explicit_none` tells "There are none."
    from an answer without places.
    """

    points: tuple[Point, ...] = ()
    tracks: tuple[Track, ...] = ()
    count: int = 0
    declared_count: int | None = None
    is_explicit_none: bool = False
    warnings: tuple[GroundingWarning, ...] = ()

    @property
    def observations(self) -> tuple[Point, ...]:
        """Points and the points of tracks, in order of the text."""
        tracked = [point for track in self.tracks for point in track.points]
        return tuple(sorted((*self.points, *tracked), key=lambda point: point.span))


_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|apos|#[0-9]{1,7}|#x[0-9a-fA-F]{1,6});")
_TAG_LIKE = re.compile(r"<(?=/?(?:point|track)s?(?![a-z]))", re.IGNORECASE)
_TRAILING_EQUALS = re.compile(r"=\Z")


def decode_text(text: str) -> str:
    """Undo character references of labels and alt texts.

    Only those closed by `;`: `html.unescape` alone would turn "R&para" into "R¶".
    """
    return _ENTITY.sub(lambda match: unescape(match.group()), text)


def encode_label(text: str) -> str:
    """Escape only what could not be read back: training writes labels as they are."""
    return _TAG_LIKE.sub("&lt;", _ENTITY.sub(lambda match: f"&amp;{match.group()[1:]}", text))


def encode_alt(text: str) -> str:
    """As `encode_label`, and quotes, and an `=` before the closing quote."""
    return _TRAILING_EQUALS.sub("&#61;", encode_label(text).replace('"', "&quot;"))
