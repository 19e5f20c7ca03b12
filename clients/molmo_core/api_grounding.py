"""Places as they travel on the wire: points, tracks, and what was wrong with the text.

Coordinates are those of `api`. Knows: names and types, how the parser's values become them. Does
not know: requests, the answers that hold them (`api`), HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from molmo_core import points as core
from molmo_core.points import WarningCode

if TYPE_CHECKING:
    from molmo_core.videos import VideoInfo

Span = tuple[int, int]
"""Offsets into the text, end exclusive."""


def is_none(value: Any) -> bool:
    return value is None


def _is_false(value: Any) -> bool:
    return value is False


class LenientAnswer(BaseModel):
    """Clients accept fields of newer servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Pixel(LenientAnswer):
    x: float
    y: float


class Point(LenientAnswer):
    """One observed place. `t` and `frame` are there for videos only."""

    x: float
    y: float
    pixel: Pixel
    id: int
    label: str | None
    media_index: int
    t: float | None = Field(default=None, exclude_if=is_none)
    frame: int | None = Field(default=None, exclude_if=is_none)
    alt: str | None = Field(default=None, exclude_if=is_none)
    confidence: float | None = Field(default=None, exclude_if=is_none)
    """0 to 1: how often such a point lies on an object, where that was asked for."""
    span: Span
    """Offsets of the triple in the text, end exclusive."""


class TrackPoint(LenientAnswer):
    t: float
    frame: int
    x: float
    y: float
    pixel: Pixel
    confidence: float | None = Field(default=None, exclude_if=is_none)
    interpolated: bool = Field(default=False, exclude_if=_is_false)
    """Between two observations, where that was asked for; the model did not write it."""


class Track(LenientAnswer):
    """One object over time."""

    id: int
    label: str | None
    media_index: int = 0
    points: list[TrackPoint]


class Observation(LenientAnswer):
    """One place as soon as it is written: a point, or one moment of a track. Its label comes with
    the whole answer."""

    kind: Literal["point", "track"]
    id: int
    media_index: int
    x: float
    y: float
    pixel: Pixel
    t: float | None = Field(default=None, exclude_if=is_none)
    frame: int | None = Field(default=None, exclude_if=is_none)
    confidence: float | None = Field(default=None, exclude_if=is_none)
    span: Span
    object: str | None = Field(default=None, exclude_if=is_none)
    """What was asked for, where several were."""


class Added(LenientAnswer):
    """The event of a stream that an observation comes in."""

    op: Literal["add"] = "add"
    item: Observation


class Frame(LenientAnswer):
    """A frame that the model saw: index in the file, seconds from its first frame."""

    index: int
    time: float


class GroundingWarning(LenientAnswer):
    """What was wrong with the text that the model wrote; see `molmo_core.points`."""

    code: WarningCode
    message: str
    span: Span


class Media(LenientAnswer):
    """One picture or video of the request; sizes in pixels as displayed."""

    index: int
    type: Literal["image", "video"]
    width: int
    height: int
    fps: float | None = Field(default=None, exclude_if=is_none)
    duration: float | None = Field(default=None, exclude_if=is_none)


class CoordinateSystem(LenientAnswer):
    units: Literal["normalized"] = "normalized"
    origin: Literal["top_left"] = "top_left"
    order: Literal["xy"] = "xy"


class Grounding(LenientAnswer):
    """All places of one answer."""

    version: Literal["1"] = "1"
    coordinate_system: CoordinateSystem = CoordinateSystem()
    media: list[Media]
    points: list[Point]
    tracks: list[Track]
    count: int
    declared_count: int | None
    """The number that the sentence states; None when it states none."""
    is_explicit_none: bool
    warnings: list[GroundingWarning]
    frames: list[Frame]
    """Of the video; empty for images."""

    @classmethod
    def from_grounding(
        cls,
        grounding: core.Grounding,
        *,
        media: Sequence[Media],
        video: VideoInfo | None = None,
        frame_times_s: Sequence[float] = (),
        confidences: Mapping[Span, float] | None = None,
    ) -> Grounding:
        """Translate what the parser found; `media` are those of the prompt, in order.

        `video` is the file behind a video medium, `frame_times_s` are the times it was sampled at,
        `confidences` those of observations by their span.
        """
        known = confidences or {}
        return cls(
            media=list(media),
            points=[_point(p, media, video, known) for p in grounding.points],
            tracks=[_track(t, media, video, known) for t in grounding.tracks],
            count=grounding.count,
            declared_count=grounding.declared_count,
            is_explicit_none=grounding.is_explicit_none,
            warnings=[
                GroundingWarning(code=w.code, message=w.message, span=w.span)
                for w in grounding.warnings
            ],
            frames=[Frame(index=_frame_at(t, video) or 0, time=t) for t in frame_times_s],
        )


def observation(
    point: core.Point,
    *,
    media: Sequence[Media],
    video: VideoInfo | None = None,
    confidence: float | None = None,
) -> Observation:
    """Translate one place that the parser has just completed."""
    return Observation(
        kind=point.kind,
        id=point.id,
        media_index=point.media_index,
        x=point.x,
        y=point.y,
        pixel=pixel_at(point.x, point.y, media[point.media_index]),
        t=point.time_s,
        frame=_frame_at(point.time_s, video),
        confidence=confidence,
        span=point.span,
    )


def pixel_at(x: float, y: float, medium: Media) -> Pixel:
    return Pixel(x=round(x * medium.width, 2), y=round(y * medium.height, 2))


def _frame_at(time_s: float | None, video: VideoInfo | None) -> int | None:
    return None if time_s is None or video is None else video.frame_at(time_s)


def _point(
    point: core.Point,
    media: Sequence[Media],
    video: VideoInfo | None,
    confidences: Mapping[Span, float],
) -> Point:
    return Point(
        x=point.x,
        y=point.y,
        pixel=pixel_at(point.x, point.y, media[point.media_index]),
        id=point.id,
        label=point.label,
        media_index=point.media_index,
        t=point.time_s,
        frame=_frame_at(point.time_s, video),
        alt=point.alt,
        confidence=confidences.get(point.span),
        span=point.span,
    )


def _track(
    track: core.Track,
    media: Sequence[Media],
    video: VideoInfo | None,
    confidences: Mapping[Span, float],
) -> Track:
    return Track(
        id=track.id,
        label=track.label,
        media_index=track.points[0].media_index,
        points=[
            TrackPoint(
                t=p.time_s or 0.0,
                frame=_frame_at(p.time_s, video) or 0,
                x=p.x,
                y=p.y,
                pixel=pixel_at(p.x, p.y, media[p.media_index]),
                confidence=confidences.get(p.span),
            )
            for p in track.points
        ],
    )
