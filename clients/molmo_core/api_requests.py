"""Requests of the verbs, and how strictly what a caller sends is read.

Knows: names, types and ranges on the wire. Does not know: answers (`api`), HTTP.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DataUrl = Annotated[
    str,
    Field(
        description="`data:image/png;base64,…` or `data:video/mp4;base64,…`, `media://media-…` of "
        "an uploaded file, an https URL where the server fetches those"
    ),
]
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
            if (unknown := next((name for name in data if name not in known), None)) is not None:
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


class GenerationOptions(StrictRequest):
    """How the answer is generated; every verb takes these."""

    model: str | None = None
    """Served model name or checkpoint id; None: whatever is served."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=False, allow_inf_nan=False)] = 0.0
    seed: Seed | None = None


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
