"""What travels between client and gateway: requests (`api_requests`), uploads (`api_media`),
answers and grounding.

Coordinates `x`, `y` are 0 to 1, origin top left, x first; `pixel` is the same place in pixels of
the picture as it is displayed (after EXIF rotation). `media_index` counts from 0, in the order
sent. Times are seconds from the first frame, `frame` is the index of the frame displayed then.

Knows: names and types on the wire. Does not know: how an answer is made (`from_grounding` only
translates), HTTP. Chat requests are OpenAI's; their answers carry `Grounding` as an extra field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from molmo_core import points as core
from molmo_core.api_media import DeletedMedia as DeletedMedia
from molmo_core.api_media import UploadedMedia as UploadedMedia
from molmo_core.api_requests import CaptionRequest as CaptionRequest
from molmo_core.api_requests import CountRequest as CountRequest
from molmo_core.api_requests import DataUrl as DataUrl
from molmo_core.api_requests import GenerationOptions as GenerationOptions
from molmo_core.api_requests import MediaFields as MediaFields
from molmo_core.api_requests import PointRequest as PointRequest
from molmo_core.api_requests import QueryRequest as QueryRequest
from molmo_core.api_requests import StrictRequest as StrictRequest
from molmo_core.api_requests import TrackRequest as TrackRequest
from molmo_core.points import WarningCode

if TYPE_CHECKING:
    from molmo_core.videos import VideoInfo


def _is_none(value: Any) -> bool:
    return value is None


class _Answer(BaseModel):
    """Clients accept fields of newer servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Pixel(_Answer):
    x: float
    y: float


class Point(_Answer):
    """One observed place. `t` and `frame` are there for videos only."""

    x: float
    y: float
    pixel: Pixel
    id: int
    label: str | None
    media_index: int
    t: float | None = Field(default=None, exclude_if=_is_none)
    frame: int | None = Field(default=None, exclude_if=_is_none)
    alt: str | None = Field(default=None, exclude_if=_is_none)
    span: tuple[int, int]
    """Offsets of the triple in the text, end exclusive."""


class TrackPoint(_Answer):
    t: float
    frame: int
    x: float
    y: float
    pixel: Pixel


class Track(_Answer):
    """One object over time."""

    id: int
    label: str | None
    media_index: int = 0
    points: list[TrackPoint]


class Frame(_Answer):
    """A frame that the model saw: index in the file, seconds from its first frame."""

    index: int
    time: float


class GroundingWarning(_Answer):
    """What was wrong with the text that the model wrote; see `molmo_core.points`."""

    code: WarningCode
    message: str
    span: tuple[int, int]


class Media(_Answer):
    """One picture or video of the request; sizes in pixels as displayed."""

    index: int
    type: Literal["image", "video"]
    width: int
    height: int
    fps: float | None = Field(default=None, exclude_if=_is_none)
    duration: float | None = Field(default=None, exclude_if=_is_none)


class CoordinateSystem(_Answer):
    units: Literal["normalized"] = "normalized"
    origin: Literal["top_left"] = "top_left"
    order: Literal["xy"] = "xy"


class Grounding(_Answer):
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
    ) -> Grounding:
        """Translate what the parser found; `media` are those of the prompt, in order.

        `video` is the file behind a video medium, `frame_times_s` are the times it was sampled at.
        """
        return cls(
            media=list(media),
            points=[_point(p, media, video) for p in grounding.points],
            tracks=[_track(t, media, video) for t in grounding.tracks],
            count=grounding.count,
            declared_count=grounding.declared_count,
            is_explicit_none=grounding.is_explicit_none,
            warnings=[
                GroundingWarning(code=w.code, message=w.message, span=w.span)
                for w in grounding.warnings
            ],
            frames=[Frame(index=_frame_at(t, video) or 0, time=t) for t in frame_times_s],
        )


def _frame_at(time_s: float | None, video: VideoInfo | None) -> int | None:
    return None if time_s is None or video is None else video.frame_at(time_s)


def _pixel(x: float, y: float, medium: Media) -> Pixel:
    return Pixel(x=round(x * medium.width, 2), y=round(y * medium.height, 2))


def _point(point: core.Point, media: Sequence[Media], video: VideoInfo | None) -> Point:
    return Point(
        x=point.x,
        y=point.y,
        pixel=_pixel(point.x, point.y, media[point.media_index]),
        id=point.id,
        label=point.label,
        media_index=point.media_index,
        t=point.time_s,
        frame=_frame_at(point.time_s, video),
        alt=point.alt,
        span=point.span,
    )


def _track(track: core.Track, media: Sequence[Media], video: VideoInfo | None) -> Track:
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
                pixel=_pixel(p.x, p.y, media[p.media_index]),
            )
            for p in track.points
        ],
    )


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens; null where it does not apply."""

    cached_tokens: int | None = None
    """Not computed again."""
    image_tokens: int | None = None
    """Stand for what is seen."""
    video_tokens: int | None = None


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class VerbAnswer(_Answer):
    """What the answers of all verbs share."""

    request_id: str
    checkpoint: str
    """Id of the checkpoint that answered: `<folder name>@<hash>`."""
    text: str
    """Exactly what the model wrote."""
    finish_reason: str | None
    """`stop`, or `length` when `max_tokens` cut the answer."""
    media: list[Media]
    frames: list[Frame]
    """Frames of the video that the model saw; empty for images."""
    warnings: list[GroundingWarning]
    usage: Usage


class PointAnswer(VerbAnswer):
    points: list[Point]
    count: int
    """Number of points."""
    found: bool
    """False only when the model says that there are none."""


class CountAnswer(VerbAnswer):
    count: int | None
    """Number of points, else the number that the sentence states, else None."""
    points: list[Point]
    found: bool


class TrackAnswer(VerbAnswer):
    tracks: list[Track]
    count: int
    """Number of tracks."""
    found: bool


class CaptionAnswer(VerbAnswer):
    caption: str


class QueryAnswer(VerbAnswer):
    answer: str
    grounding: Grounding


class ModelCard(_Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "molmo"
    checkpoint: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(_Answer):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(_Answer):
    """OpenAI's error body."""

    error: ErrorBody
