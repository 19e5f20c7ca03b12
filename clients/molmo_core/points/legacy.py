"""The point and track formats of older Molmo models, read only when a caller asks for them.

Several of them look like prose ("(1.0, 2.0)"), so none is tried on a current model's answer.
The first format that yields an observation is taken. Numbers are per cent of the size unless
they are three bare digits, which are thousandths.
Knows: those formats. Does not know: the current grammar. Source: evaluation specification, 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from molmo_core.points.grounding import GroundingWarning, Kind, Media, Point, decode_text

_NUMBER = r"([0-9]{1,4}(?:\.[0-9]{1,4})?)"
_DECIMAL = r"([0-9]{1,3}\.[0-9]{1,4})"
_PER_CENT, _PER_MILLE = 100.0, 1000.0
_DECIMALS = 6  # as many as four decimals of a per cent can need

# Every repetition is bounded or ends at a character that opens the next match: linear time.
_POINT_TAG = re.compile(r"<points?[ \t\n]([^<>]*)>(?:([^<]*)</points?>)?")
_ALT = re.compile(r'\balt="([^"]*)"')
_X_Y = re.compile(rf'\bx([0-9]{{0,4}})="[ ]?{_NUMBER}"[ \t\n]{{1,4}}y\1="[ ]?{_NUMBER}"')
_COMPACT_TRIPLE = re.compile(rf"(?<![0-9.])([0-9]{{1,4}})[ \t]{_NUMBER}[ ]{_NUMBER}(?![0-9.])")
_COMPACT_VIDEO = re.compile(rf"{_NUMBER}\t")
_CLICK = re.compile(rf"\bClick\({_NUMBER}, ?{_NUMBER}\)")
_P_FORM = re.compile(r"\bp ?= ?([0-9]{3}) ?, ?([0-9]{3})(?![0-9])")
_BARE = re.compile(rf"(?<![0-9.])\(?{_DECIMAL}, ?{_DECIMAL}\)?(?![0-9.])")
_TIME_BLOCK = re.compile(
    rf"\btime[ \t]{{1,8}}{_NUMBER}[ \t]{{0,8}}\r?\n[ \t]{{0,8}}\{{([^{{}}]*)\}}"
)
_OBJECT = re.compile(rf"([0-9]{{1,6}}): ?\[{_NUMBER}, ?{_NUMBER}(, ?yes)?\]")
_OBJECT_SPANS = re.compile(r"(?<![0-9])([0-9]{1,6}): ?\(([^()]*)\)")
_X_Y_TIME = re.compile(rf"\[{_NUMBER}, ?{_NUMBER}, ?{_NUMBER}\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sighting:
    """What a format reads, before scaling. `divisor` None: per cent, or thousandths if above."""

    x: float
    y: float
    id: int
    span: tuple[int, int]
    divisor: float | None = _PER_CENT
    time_s: float | None = None
    kind: Kind = "point"
    label: str | None = None
    alt: str | None = None


def find_legacy_points(text: str, *, media: Media) -> tuple[list[Point], list[GroundingWarning]]:
    """Return the observations of the first legacy format found in `text`, and warnings."""
    for name, read in (_VIDEO_FORMATS if media == "video" else _IMAGE_FORMATS).items():
        sightings = list(read(text))
        if sightings:
            return _scaled(name, sightings)
    return [], []


def _scaled(name: str, sightings: list[_Sighting]) -> tuple[list[Point], list[GroundingWarning]]:
    span = (sightings[0].span[0], sightings[-1].span[1])
    message = f"read as the older format {name!r}"
    warnings = [GroundingWarning(code="legacy_format", message=message, span=span)]
    points = []
    for seen in sightings:
        divisor = seen.divisor
        if divisor is None:
            divisor = _PER_CENT if max(seen.x, seen.y) <= _PER_CENT else _PER_MILLE
        if max(seen.x, seen.y) > divisor:
            message = f"({seen.x}, {seen.y}) is above {divisor:g}; the point is dropped"
            warnings.append(GroundingWarning(code="out_of_range", message=message, span=seen.span))
            continue
        points.append(
            Point(
                x=round(seen.x / divisor, _DECIMALS),
                y=round(seen.y / divisor, _DECIMALS),
                id=seen.id,
                media_index=0,
                time_s=seen.time_s,
                label=seen.label,
                alt=seen.alt,
                kind=seen.kind,
                span=seen.span,
            )
        )
    return points, warnings


def _attribute_tags(text: str) -> Iterator[_Sighting]:
    """`<point x="1.0" y="2.0" alt="..">label</point>` and `<points x1= y1= x2= y2= ..>`."""
    for tag in _POINT_TAG.finditer(text):
        alt = _ALT.search(tag[1])
        for rank, match in enumerate(_X_Y.finditer(_blank(_ALT, tag[1])), start=1):
            yield _Sighting(
                x=float(match[2]),
                y=float(match[3]),
                id=int(match[1] or rank),
                span=_shifted(match, tag.start(1)),
                divisor=None,
                label=None if tag[2] is None else decode_text(tag[2]),
                alt=None if alt is None else decode_text(alt[1]),
            )


def _compact_tags(text: str) -> Iterator[_Sighting]:
    """`<points label TAB alt TAB 1 99.0 80.0 2 ../>`, or `1 990 800` without decimals."""
    for tag in _POINT_TAG.finditer(text):
        label, alt, coordinates = _three_fields(tag[1])
        start = tag.start(1) + len(tag[1]) - len(coordinates)
        for match in _COMPACT_TRIPLE.finditer(coordinates.removesuffix("/")):
            yield _Sighting(
                x=float(match[2]),
                y=float(match[3]),
                id=int(match[1]),
                span=_shifted(match, start),
                divisor=_PER_CENT if "." in match[2] + match[3] else _PER_MILLE,
                label=label,
                alt=None if alt == "-" else alt,
            )


def _three_fields(attributes: str) -> tuple[str | None, str | None, str]:
    label, _, rest = attributes.partition("\t")
    alt, separator, coordinates = rest.partition("\t")
    return (label, alt, coordinates) if separator else (None, None, "")


def _clicks(text: str) -> Iterator[_Sighting]:
    return _pairs(_CLICK, text, _PER_CENT)


def _p_forms(text: str) -> Iterator[_Sighting]:
    return _pairs(_P_FORM, text, _PER_MILLE)


def _bare_pairs(text: str) -> Iterator[_Sighting]:
    return _pairs(_BARE, text, _PER_CENT)


def _pairs(pattern: re.Pattern[str], text: str, divisor: float) -> Iterator[_Sighting]:
    for rank, match in enumerate(pattern.finditer(text), start=1):
        yield _Sighting(
            x=float(match[1]), y=float(match[2]), id=rank, span=match.span(), divisor=divisor
        )


def _video_tags(text: str) -> Iterator[_Sighting]:
    """`<points 13.5 TAB 1 44.4 69.9 2 ../>`: one tag for each moment."""
    for tag in _POINT_TAG.finditer(text):
        moment = _COMPACT_VIDEO.match(tag[1])
        if moment is None:
            continue
        for match in _COMPACT_TRIPLE.finditer(tag[1].removesuffix("/"), moment.end()):
            yield _Sighting(
                x=float(match[2]),
                y=float(match[3]),
                id=int(match[1]),
                span=_shifted(match, tag.start(1)),
                time_s=float(moment[1]),
            )


def _tracks_by_time(text: str) -> Iterator[_Sighting]:
    """`time 0.50`, line break, `{0: [x, y], 1: [x, y, yes]}`; `yes` marks an occluded object."""
    for block in _TIME_BLOCK.finditer(text):
        for match in _OBJECT.finditer(block[2]):
            if match[4] is None:
                yield _Sighting(
                    x=float(match[2]),
                    y=float(match[3]),
                    id=int(match[1]),
                    span=_shifted(match, block.start(2)),
                    time_s=float(block[1]),
                    kind="track",
                )


def _tracks_by_object(text: str) -> Iterator[_Sighting]:
    """`0: ([x, y, t], [x, y, t])`."""
    for spans in _OBJECT_SPANS.finditer(text):
        yield from _moments(spans[2], int(spans[1]), spans.start(2))


def _single_track(text: str) -> Iterator[_Sighting]:
    """`[x, y, t], [x, y, t], ..`."""
    return _moments(text, 0, 0)


def _moments(text: str, object_id: int, start: int) -> Iterator[_Sighting]:
    for match in _X_Y_TIME.finditer(text):
        yield _Sighting(
            x=float(match[1]),
            y=float(match[2]),
            id=object_id,
            span=_shifted(match, start),
            time_s=float(match[3]),
            kind="track",
        )


def _shifted(match: re.Match[str], start: int) -> tuple[int, int]:
    return match.start() + start, match.end() + start


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """Overwrite what matches with spaces, so that offsets stay."""
    return pattern.sub(lambda match: " " * len(match.group()), text)


_IMAGE_FORMATS: dict[str, Callable[[str], Iterator[_Sighting]]] = {
    "point attributes": _attribute_tags,
    "compact tag": _compact_tags,
    "Click(x, y)": _clicks,
    "p=x,y": _p_forms,
    "bare pair": _bare_pairs,
}
_VIDEO_FORMATS: dict[str, Callable[[str], Iterator[_Sighting]]] = {
    "video tag": _video_tags,
    "tracks by time": _tracks_by_time,
    "tracks by object": _tracks_by_object,
    "single track": _single_track,
}
