"""The points and tracks of a row under examination: which lie outside, and how they are spread.

Knows: in which forms a row gives places. Does not know: media beyond their size, findings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_core.errors import InvalidExample
from molmo_training.data.example import Picture
from molmo_training.data.formatting.media import RowMedia, scale_of
from molmo_training.data.formatting.row import Row, flag, shortened, xy_of
from molmo_training.data.own.schema import questions_of

LEAST_POINTS = 8
"""Of a dataset, before anything is said of their scale."""


@dataclass(frozen=True, kw_only=True)
class PointSpread:
    """Where points lie: how many, the largest coordinate, and what they are counted in."""

    unit: str
    n_points: int
    largest: float
    side: float
    """The longest side of the pictures, in the same unit."""

    def joined(self, other: PointSpread) -> PointSpread:
        """Of both; the side is that of the smaller pictures."""
        return PointSpread(
            unit=self.unit,
            n_points=self.n_points + other.n_points,
            largest=max(self.largest, other.largest),
            side=min(self.side, other.side),
        )

    def doubt(self) -> str | None:
        """Why the scale may be wrong, in words."""
        if self.n_points < LEAST_POINTS or self.largest <= 0:
            return None
        lie = f"all {self.n_points:,} points lie within 0…{self.largest:g}, counted in {self.unit}"
        for most, name in ((1, "parts of the side"), (100, "per cent"), (1000, "thousandths")):
            if self.largest <= most < self.side / 1.5:
                return f"{lie}: if they are {name}, set point_scale to {most}"
        return None


@dataclass(frozen=True, kw_only=True)
class Places:
    """`fault` says what is wrong with the first place at fault, `field` where it stands."""

    spread: PointSpread | None = None
    fault: str | None = None
    field: str | None = None


def examine_places(row: Row, pictures: Sequence[Picture]) -> Places:
    """All places of a row, also those that a drawn question would leave out."""
    spread: PointSpread | None = None
    is_video = "video" in row
    media = RowMedia(frames=pictures) if is_video else RowMedia(images=pictures)
    for inside, question in questions_of(row):
        for field, image, name, place in _places_of(question):
            try:
                scale_xy = scale_of(question, media, 0 if is_video else image)
                xy = xy_of(question, field, place)
                is_clipped = flag(question, "clip_points")
            except InvalidExample:
                fault = f"{name}{inside} is {shortened(place)}; give [x, y] or {{x, y}} of numbers"
                return Places(fault=fault, field=field)
            if not is_clipped and not all(
                0 <= v <= most for v, most in zip(xy, scale_xy, strict=True)
            ):
                unit = _unit(question)
                fault = (
                    f"{name}{inside} is ({xy[0]:g}, {xy[1]:g}), outside 0…{scale_xy[0]:g} × "
                    f"0…{scale_xy[1]:g} ({unit}): correct it or its scale, or set clip_points"
                )
                return Places(fault=fault, field=field)
            one = PointSpread(unit=_unit(question), n_points=1, largest=max(xy), side=max(scale_xy))
            spread = one if spread is None else spread.joined(one)
    return Places(spread=spread)


def _places_of(question: Row) -> Iterator[tuple[str, int, str, Any]]:
    """Field, index of the image, name and value of each place."""
    for k, place in enumerate(question.get("points", ())):
        if isinstance(place, Mapping) and "points" in place:
            for n, inner in enumerate(place["points"]):
                yield "points", 0, f"points[{k}].points[{n}]", inner
        else:
            yield "points", 0, f"points[{k}]", place
    for label, of_images in _pairs(question.get("points_by_label")):
        for image, places in enumerate(_listed(of_images)):
            for n, place in enumerate(_listed(places)):
                yield "points_by_label", image, f"the points of {label!r}[{image}][{n}]", place
    for k, moment in enumerate(question.get("tracks", ())):
        for n, place in enumerate(_listed(moment.get("points"))):
            if not (isinstance(place, Mapping) and place.get("occluded")):
                yield "tracks", 0, f"tracks[{k}].points[{n}]", place


def _pairs(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(label), of_images) for label, of_images in value.items())


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []


def _unit(question: Row) -> str:
    if question.get("point_scale") is not None:
        return f"point_scale {question['point_scale']:g}"
    has_size = question.get("width") is not None or question.get("height") is not None
    return "width and height" if has_size else "pixels"
