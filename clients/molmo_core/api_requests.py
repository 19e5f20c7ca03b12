"""Requests of the verbs, and how strictly what a caller sends is read.

Knows: names, types and ranges on the wire. Does not know: answers (`api`), HTTP.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

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
            for name in data.keys() - cls.model_fields.keys():
                raise _unknown_field(cls, str(name)[:60])
        return data


def _unknown_field(model: type[BaseModel], name: str) -> PydanticCustomError:
    near = get_close_matches(name, model.model_fields, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "leave it out;"
    return PydanticCustomError(
        "unknown_field",
        "got the unknown field '{name}': {hint} allowed are {allowed}",
        {"name": name, "hint": hint, "allowed": ", ".join(sorted(model.model_fields))},
    )


Seconds = Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]


def _from_form(options: Any) -> Any:
    """Forms send an object as text."""
    if not isinstance(options, str):
        return options
    try:
        return from_json(options)
    except ValueError as error:
        raise ValueError('this is no JSON; send an object, as {"max_crops": 12}') from error


class MediaOptions(StrictRequest):
    """How closely media are looked at; what is left out is as the model was trained."""

    model_config = ConfigDict(frozen=True)

    max_crops: Annotated[int, Field(ge=1, le=MOST_CROPS)] | None = None
    """Of pictures: most tiles that one is cut into."""
    max_frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None = None
    """Of a video: most frames that are sampled; beyond, they are spread evenly."""
    fps: Annotated[float, Field(gt=0, le=MOST_FPS, strict=False, allow_inf_nan=False)] | None = None
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
    temperature: Annotated[float, Field(ge=0, le=2, strict=False, allow_inf_nan=False)] = 0.0
    seed: Seed | None = None
    media_options: Annotated[MediaOptions, BeforeValidator(_from_form)] | None = None


class MediaFields(GenerationOptions):
    """Exactly one of the three; `images` holds one or several."""

    image_url: DataUrl | None = None
    images: Annotated[list[DataUrl], Field(min_length=1)] | None = None
    video_url: DataUrl | None = None

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        given = [n for n in ("image_url", "images", "video_url") if getattr(self, n) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"got {got}; send exactly one of image_url, images and video_url")
        return self

    @property
    def image_urls(self) -> list[str]:
        return [self.image_url] if self.image_url is not None else list(self.images or [])


class Constrainable(StrictRequest):
    constrained: bool | None = None
    """Whether the answer is decoded under the verb's grammar; None: as the server is set."""


class PointRequest(MediaFields, Constrainable):
    object: Annotated[str, Field(min_length=1, description="what to point at: `the red circle`")]


class CountRequest(MediaFields, Constrainable):
    object: Annotated[str, Field(min_length=1, description="what to count: `stars`")]


class TrackRequest(GenerationOptions, Constrainable):
    video_url: DataUrl
    object: Annotated[str, Field(min_length=1, description="what to follow: `the blue square`")]

    @property
    def image_urls(self) -> list[str]:
        return []


class CaptionRequest(MediaFields):
    pass


class QueryRequest(MediaFields):
    question: Annotated[str, Field(min_length=1)]
