"""The table of verbs: what each is asked with, and which answer it gives.

Knows: requests and answers of verbs. Does not know: HTTP, how the text was generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molmo_core import api
from molmo_core.prompts import Verb
from molmo_server.answers.grammar import AnswerForm
from molmo_server.answers.reading import read_answer
from molmo_server.media.gate import CheckedMedia


@dataclass(frozen=True, kw_only=True)
class Written:
    """One answer of the engine, and what stands beside it."""

    text: str
    grounding: api.Grounding
    shared: dict[str, Any]
    """Fields of `VerbAnswer`."""


def written(
    answer: dict[str, Any], media: CheckedMedia, *, request_id: str, checkpoint: str
) -> Written:
    """Read the engine's chat completion."""
    choice, usage = answer["choices"][0], answer["usage"]
    text = choice["message"]["content"] or ""
    grounding = read_answer(text, media)
    shared = {
        "request_id": request_id,
        "checkpoint": checkpoint,
        "text": text,
        "finish_reason": choice["finish_reason"],
        "media": grounding.media,
        "frames": grounding.frames,
        "warnings": grounding.warnings,
        "usage": api.Usage.model_validate(usage),
    }
    return Written(text=text, grounding=grounding, shared=shared)


def _point(answer: Written) -> api.PointAnswer:
    points = answer.grounding.points
    return api.PointAnswer(points=points, count=len(points), found=_found(answer), **answer.shared)


def _count(answer: Written) -> api.CountAnswer:
    grounding = answer.grounding
    count = len(grounding.points) if grounding.points else grounding.declared_count
    return api.CountAnswer(
        count=count, points=grounding.points, found=_found(answer), **answer.shared
    )


def _track(answer: Written) -> api.TrackAnswer:
    tracks = answer.grounding.tracks
    return api.TrackAnswer(tracks=tracks, count=len(tracks), found=_found(answer), **answer.shared)


def _caption(answer: Written) -> api.CaptionAnswer:
    return api.CaptionAnswer(caption=answer.text.strip(), **answer.shared)


def _query(answer: Written) -> api.QueryAnswer:
    return api.QueryAnswer(answer=answer.text.strip(), grounding=answer.grounding, **answer.shared)


def _found(answer: Written) -> bool:
    return not answer.grounding.is_explicit_none


@dataclass(frozen=True, kw_only=True)
class VerbSpec:
    request: type[api.GenerationOptions]
    answer: type[api.VerbAnswer]
    read: Callable[[Written], api.VerbAnswer]
    text_field: str | None
    """Field of the request that the prompt is made of."""
    summary: str
    form: AnswerForm | None = None
    """Under whose grammar the answer may be decoded."""


VERBS: dict[Verb, VerbSpec] = {
    "point": VerbSpec(
        request=api.PointRequest,
        answer=api.PointAnswer,
        read=_point,
        text_field="object",
        summary="Point at every object of a kind, in images or a video",
        form="point",
    ),
    "count": VerbSpec(
        request=api.CountRequest,
        answer=api.CountAnswer,
        read=_count,
        text_field="object",
        summary="Count objects of a kind, with a point on each",
        form="count",
    ),
    "track": VerbSpec(
        request=api.TrackRequest,
        answer=api.TrackAnswer,
        read=_track,
        text_field="object",
        summary="Follow objects through a video",
        form="track",
    ),
    "caption": VerbSpec(
        request=api.CaptionRequest,
        answer=api.CaptionAnswer,
        read=_caption,
        text_field=None,
        summary="Describe an image or a video",
    ),
    "query": VerbSpec(
        request=api.QueryRequest,
        answer=api.QueryAnswer,
        read=_query,
        text_field="question",
        summary="Answer a question about images or a video",
    ),
}
