"""What travels between client and gateway: requests (`api_requests`), uploads (`api_media`),
places (`api_grounding`), answers.

Coordinates `x`, `y` are 0 to 1, origin top left, x first; `pixel` is the same place in pixels of
the picture as it is displayed (after EXIF rotation). `media_index` counts from 0, in the order
sent. Times are seconds from the first frame, `frame` is the index of the frame displayed then.

Knows: names and types on the wire. Does not know: how an answer is made (`from_grounding` only
translates), HTTP. Chat requests are OpenAI's; their answers carry `Grounding` as an extra field.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from molmo_core.api_grounding import Added as Added
from molmo_core.api_grounding import CoordinateSystem as CoordinateSystem
from molmo_core.api_grounding import Frame as Frame
from molmo_core.api_grounding import Grounding as Grounding
from molmo_core.api_grounding import GroundingWarning as GroundingWarning
from molmo_core.api_grounding import LenientAnswer, is_none
from molmo_core.api_grounding import Media as Media
from molmo_core.api_grounding import Observation as Observation
from molmo_core.api_grounding import Pixel as Pixel
from molmo_core.api_grounding import Point as Point
from molmo_core.api_grounding import Track as Track
from molmo_core.api_grounding import TrackPoint as TrackPoint
from molmo_core.api_media import DeletedMedia as DeletedMedia
from molmo_core.api_media import UploadedMedia as UploadedMedia
from molmo_core.api_requests import CaptionRequest as CaptionRequest
from molmo_core.api_requests import CountRequest as CountRequest
from molmo_core.api_requests import DataUrl as DataUrl
from molmo_core.api_requests import GenerationOptions as GenerationOptions
from molmo_core.api_requests import GivenPoint as GivenPoint
from molmo_core.api_requests import MediaFields as MediaFields
from molmo_core.api_requests import MediaOptions as MediaOptions
from molmo_core.api_requests import PointingRequest as PointingRequest
from molmo_core.api_requests import PointRequest as PointRequest
from molmo_core.api_requests import QueryRequest as QueryRequest
from molmo_core.api_requests import Region as Region
from molmo_core.api_requests import StrictRequest as StrictRequest
from molmo_core.api_requests import TrackRequest as TrackRequest

Status = Literal["found", "none", "unreadable"]
"""`none`: the model says that there are none. `unreadable`: it says neither that nor anything that
could be read as a place or number; see `text` and `warnings`."""


class PromptTokensDetails(LenientAnswer):
    """Of the prompt's tokens; null where it does not apply."""

    cached_tokens: int | None = None
    """Not computed again."""
    image_tokens: int | None = None
    """Stand for what is seen."""
    video_tokens: int | None = None


class Usage(LenientAnswer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class VerbAnswer(LenientAnswer):
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


class OneObject(LenientAnswer):
    """The answer about one of several objects; spans are offsets into its own text."""

    object: str
    status: Status
    count: int | None
    points: list[Point] = Field(default_factory=list)
    tracks: list[Track] = Field(default_factory=list)
    text: str
    finish_reason: str | None
    warnings: list[GroundingWarning]
    checkpoint: str


class PointingAnswer(VerbAnswer):
    """What point, count and track answer. Where several objects were asked about, it holds all
    their places, and the texts one below the other; ids begin anew with each object."""

    found: bool
    """Something was found: `status` tells why not."""
    status: Status
    count: int | None
    objects: list[OneObject] | None = Field(default=None, exclude_if=is_none)
    """One an object, in the order asked; only where several were."""


class PointAnswer(PointingAnswer):
    points: list[Point]
    count: int
    """Number of points."""


class CountAnswer(PointingAnswer):
    """`count` is the number of points, else the number that the sentence states, else None."""

    points: list[Point]


class TrackAnswer(PointingAnswer):
    tracks: list[Track]
    count: int
    """Number of tracks."""


class CaptionAnswer(VerbAnswer):
    caption: str


class QueryAnswer(VerbAnswer):
    answer: str
    grounding: Grounding


class ModelCard(LenientAnswer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "molmo"
    checkpoint: str
    max_model_len: int


class ModelList(LenientAnswer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(LenientAnswer):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(LenientAnswer):
    """OpenAI's error body."""

    error: ErrorBody
