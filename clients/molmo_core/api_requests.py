"""Requests of the verbs, and how strictly what a caller sends is read.

Knows: names, types and ranges on the wire. Does not know: answers (`api`), HTTP.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

DataUrl = Annotated[
    str,
    Field(
        description="`data:image/png;base64,…` or `data:video/mp4;base64,…`, `media://media-…` of "
        "an uploaded file, an https URL where the server fetches those"
    ),
]
MOST_CROPS, MOST_FRAMES, MOST_FPS = 24, 384, 30.0
"""That may be asked for: crops and frames as many as Molmo2 was trained with at most."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What a random generator of the engine takes."""


class StrictRequest(BaseModel):
    """Base of everything a caller sends: unknown fields are refused, with near matches."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_only_known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = _names_of(cls)
            if not known.issuperset(data):
                unknown = next(name for name in data if name not in known)
                raise _unknown_field(cls, str(unknown)[:60])
        return data


@cache
def _names_of(model: type[BaseModel]) -> frozenset[str]:
    """Of fields, as they are sent."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def _unknown_field(model: type[BaseModel], name: str) -> PydanticCustomError:
    allowed = _names_of(model)
    near = get_close_matches(name, allowed, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "leave it out;"
    return PydanticCustomError(
        "unknown_field",
        "got the unknown field '{name}': {hint} allowed are {allowed}",
        {"name": name, "hint": hint, "allowed": ", ".join(sorted(allowed))},
    )


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MediaOptions(StrictRequest):
    """How closely media are looked at; what is left out is as the model was trained."""

    model_config = ConfigDict(frozen=True)

    max_crops: Annotated[int, Field(ge=1, le=MOST_CROPS)] | None = None
    """Of pictures: most tiles that one is cut into."""
    max_frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None = None
    """Of a video: most frames that are sampled; beyond, they are spread evenly."""
    fps: Annotated[float, Field(gt=0, le=MOST_FPS, allow_inf_nan=False)] | None = None
    """Of a video: frames that are sampled a second."""
    start: Seconds | None = None
    end: Seconds | None = None
    """Of a video: only this part is sampled. Times in typed answers stay those of the file; the
    model, and what it writes, counts from the part's start, as it was trained."""

    @model_validator(mode="after")
    def _has_a_part(self) -> Self:
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise ValueError(
                f"got the part from {self.start or 0:g} to {self.end:g} s; give a later end"
            )
        return self


class GenerationOptions(StrictRequest):
    """How the answer is generated; every verb takes these."""

    model: str | None = None
    """Served model name or checkpoint id; None: whatever is served."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    seed: Seed | None = None
    media_options: MediaOptions | None = None


_ONE_KIND: list[JsonValue] = [
    {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
    for name in ("image_url", "images", "video_url")
]


Share = Annotated[float, Field(ge=0, le=1, strict=False, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=120, strict=False, allow_inf_nan=False)]
"""A second."""
ObjectName = Annotated[
    str, Field(min_length=1, description="what is meant: `the red circle`, `stars`")
]


class Region(StrictRequest):
    """A rectangle of the picture as it is displayed, from 0 to 1, origin top left."""

    x0: Share
    y0: Share
    x1: Share
    y1: Share

    @model_validator(mode="after")
    def _has_an_inside(self) -> Self:
        if self.x0 >= self.x1 or self.y0 >= self.y1:
            raise ValueError(
                f"got x from {self.x0:g} to {self.x1:g} and y from {self.y0:g} to {self.y1:g}; "
                "x0 must be left of x1, and y0 above y1"
            )
        return self


class MediaFields(GenerationOptions):
    """Exactly one of the three; `images` holds one or several."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_KIND})

    image_url: DataUrl | None = None
    images: Annotated[list[DataUrl], Field(min_length=1)] | None = None
    video_url: DataUrl | None = None
    region: Region | None = None
    """Only this part of the one picture is looked at; places come back in the whole picture."""

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        given = [n for n in ("image_url", "images", "video_url") if getattr(self, n) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"got {got}; send exactly one of image_url, images and video_url")
        if self.region is not None and len(self.image_urls) != 1:
            got = "a video" if self.video_url is not None else f"{len(self.image_urls)} pictures"
            raise ValueError(f"got a region and {got}; a region is of one picture")
        return self

    @property
    def image_urls(self) -> list[str]:
        return [self.image_url] if self.image_url is not None else list(self.images or [])


class PointingRequest(GenerationOptions):
    """What point, count and track have in common."""

    object: ObjectName | None = None
    """What is meant: `the red circle`."""
    objects: Annotated[list[ObjectName], Field(min_length=1)] | None = None
    """Several instead of one; each is asked about the same media."""
    constrained: bool | None = None
    """Whether the answer is decoded under the verb's grammar; None: as the server is set."""
    confidence: bool | None = None
    """Whether each place comes with its confidence; None: as the server is set."""
    max_points: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """So many points are kept, of each object that was asked for; of tracks so many tracks."""
    stream: bool = False
    """Each place as soon as it is written, and then the whole answer, as events."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if (self.object is None) == (self.objects is None):
            got = "neither" if self.object is None else "both of them"
            raise ValueError(f"got {got}; send exactly one of object and objects")
        return self

    @property
    def labels(self) -> list[str]:
        return [self.object] if self.object is not None else list(self.objects or [])


class PointRequest(MediaFields, PointingRequest):
    pass


class CountRequest(MediaFields, PointingRequest):
    pass


class GivenPoint(StrictRequest):
    """A place of one object at one moment, seconds; `x`, `y` from 0 to 1."""

    t: Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]
    x: Share
    y: Share


class TrackRequest(PointingRequest):
    video_url: DataUrl
    points: Annotated[list[GivenPoint], Field(min_length=1)] | None = None
    """Objects to go on following, one a point, from behind its moment on; of one `object`."""
    frame_rate: Rate | None = None
    """So many moments a second in the answer, of those that the model sees."""
    interpolate: Rate | bool = False
    """Places between two observations: so many a second, or with true in every frame."""

    @model_validator(mode="after")
    def _continues_one_object(self) -> Self:
        if self.points is not None and self.objects is not None:
            raise ValueError("got points and objects; points go with one object")
        return self

    @property
    def image_urls(self) -> list[str]:
        return []


class CaptionRequest(MediaFields):
    pass


class QueryRequest(MediaFields):
    question: Annotated[str, Field(min_length=1)]
