"""What each method of a client sends and expects, the same for the sync and the async one.

Knows: paths, bodies and answer types of the verbs. Does not know: how a request is sent.
Source: `molmo_core.api`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypedDict, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from molmo_client.failures import RequestFailed, failure_of
from molmo_client.media import MediaInput, OneMedia, encode, encode_all, media_type
from molmo_client.tracing import trace_headers
from molmo_core import api
from molmo_core.api import GivenPoint, Region
from molmo_core.errors import InvalidMedia, InvalidRequest

Answer = TypeVar("Answer", bound=BaseModel)
Request = TypeVar("Request", bound=BaseModel)


class Generation(TypedDict, total=False):
    """Keyword arguments that every verb takes; see `molmo_core.api.GenerationOptions`."""

    model: str | None
    max_tokens: int | None
    temperature: float
    seed: int | None
    media_options: api.MediaOptions | dict[str, Any] | None
    """How closely media are looked at: `{"max_crops": 12}`, `{"fps": 1, "start": 2, "end": 9}`."""
    region: Region | dict[str, float] | None
    """Of one picture, all but track: `{"x0": 0.5, "y0": 0, "x1": 1, "y1": 0.5}`."""

    # Of point, count and track.
    constrained: bool | None
    confidence: bool | None
    max_points: int | None

    # Of track.
    frame_rate: float | None
    interpolate: float | bool
    points: list[GivenPoint | dict[str, float]] | None
    """Objects to go on following: `[{"t": 0.5, "x": 0.2, "y": 0.7}]`."""


PointingVerb = Literal["point", "count", "track"]
What = str | Sequence[str]
"""One object, or several to be asked about one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[Answer]):
    method: str
    path: str
    body: bytes | None
    answer_type: type[Answer]
    content_type: str = "application/json"
    file: BinaryIO | None = None
    """A file of requests, sent as a form while it is read."""

    def request_options(self) -> dict[str, Any]:
        """Keyword arguments for `httpx2`'s `request`."""
        headers = trace_headers()
        options: dict[str, Any] = {"method": self.method, "url": self.path, "headers": headers}
        if self.body is not None:
            options["content"] = self.body
            headers["content-type"] = self.content_type
        if self.file is not None:
            name = Path(self.file.name).name
            options |= {"files": {"file": (name, self.file)}, "data": {"purpose": "batch"}}
        return options

    def read(self, response: httpx2.Response) -> Answer:
        """The typed answer; raises the error that an answer without success stands for."""
        if response.status_code >= 400:
            raise failure_of(response.status_code, response.headers, response.content)
        try:
            return self.answer_type.model_validate_json(response.content)
        except ValidationError as failure:
            raise RequestFailed(
                f"{response.url} answered {response.status_code} with something else than a "
                f"{self.answer_type.__name__}; check that the address is a Molmo server"
            ) from failure


def point(media: MediaInput, what: What, options: Generation) -> Call[api.PointAnswer]:
    fields = {**_media_fields(media), **_objects(what), **options}
    return _verb("/v1/point", api.PointRequest, fields, api.PointAnswer)


def count(media: MediaInput, what: What, options: Generation) -> Call[api.CountAnswer]:
    fields = {**_media_fields(media), **_objects(what), **options}
    return _verb("/v1/count", api.CountRequest, fields, api.CountAnswer)


def track(video: MediaInput, what: What, options: Generation) -> Call[api.TrackAnswer]:
    encoded = encode_all(video)
    if len(encoded) != 1 or not encoded[0].may_be_video:
        raise InvalidMedia("tracking takes one video and got a picture; use point for pictures")
    fields = {"video_url": encoded[0].url, **_objects(what), **options}
    return _verb("/v1/track", api.TrackRequest, fields, api.TrackAnswer)


def streamed(verb: PointingVerb, media: MediaInput, what: What, options: Generation) -> Call[Any]:
    """The answer type is that of the verb."""
    asking: Generation = {**options, "stream": True}  # type: ignore[typeddict-unknown-key]
    if verb == "track":
        return track(media, what, asking)
    return point(media, what, asking) if verb == "point" else count(media, what, asking)


def caption(media: MediaInput, options: Generation) -> Call[api.CaptionAnswer]:
    fields = {**_media_fields(media), **options}
    return _verb("/v1/caption", api.CaptionRequest, fields, api.CaptionAnswer)


def query(media: MediaInput, question: str, options: Generation) -> Call[api.QueryAnswer]:
    fields = {**_media_fields(media), "question": question, **options}
    return _verb("/v1/query", api.QueryRequest, fields, api.QueryAnswer)


def upload(media: OneMedia) -> Call[api.UploadedMedia]:
    content = encode(media).content()
    return Call(
        method="POST",
        path="/v1/media",
        body=content,
        content_type=media_type(content) or "image/*",
        answer_type=api.UploadedMedia,
    )


def models() -> Call[api.ModelList]:
    return Call(method="GET", path="/v1/models", body=None, answer_type=api.ModelList)


def _objects(what: What) -> dict[str, Any]:
    return {"object": what} if isinstance(what, str) else {"objects": list(what)}


def _media_fields(media: MediaInput) -> dict[str, Any]:
    encoded = encode_all(media)
    if encoded[0].kind == "video":
        return {"video_url": encoded[0].url}
    if len(encoded) == 1:
        return {"image_url": encoded[0].url}
    return {"images": [one.url for one in encoded]}


def _verb(
    path: str, request_type: type[Request], fields: dict[str, Any], answer_type: type[Answer]
) -> Call[Answer]:
    try:
        request = request_type.model_validate(fields)
    except ValidationError as failure:
        first = failure.errors(include_input=False, include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(f"{param or 'request'}: {first['msg']}", param=param) from failure
    body = request.model_dump_json(exclude_none=True, exclude_unset=True).encode()
    return Call(method="POST", path=path, body=body, answer_type=answer_type)
