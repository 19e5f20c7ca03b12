"""The table of verbs: what each is asked with, and which answer it gives.

Knows: requests and answers of verbs. Does not know: HTTP, how the text was generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from molmo_core import api
from molmo_core.prompts import Verb
from molmo_server.answers.grammar import AnswerForm
from molmo_server.answers.reading import AnswerReader


@dataclass(frozen=True, kw_only=True)
class Written:
    """One answer of the engine, and what stands beside it."""

    text: str
    grounding: api.Grounding
    shared: dict[str, Any]
    """Fields of `VerbAnswer`."""


def written(
    reader: AnswerReader,
    *,
    finish_reason: str | None,
    usage: Mapping[str, Any],
    request_id: str,
    checkpoint: str,
) -> Written:
    """Of a reader that was fed all that the engine wrote."""
    grounding = reader.close()
    shared = {
        "request_id": request_id,
        "checkpoint": checkpoint,
        "text": reader.text,
        "finish_reason": finish_reason,
        "media": grounding.media,
        "frames": grounding.frames,
        "warnings": grounding.warnings,
        "usage": api.Usage.model_validate(usage),
    }
    return Written(text=reader.text, grounding=grounding, shared=shared)


def _point(answer: Written) -> api.PointAnswer:
    points = answer.grounding.points
    return api.PointAnswer(points=points, count=len(points), **_pointing(answer))


def _count(answer: Written) -> api.CountAnswer:
    grounding = answer.grounding
    count = len(grounding.points) if grounding.points else grounding.declared_count
    return api.CountAnswer(count=count, points=grounding.points, **_pointing(answer, count))


def _track(answer: Written) -> api.TrackAnswer:
    tracks = answer.grounding.tracks
    return api.TrackAnswer(tracks=tracks, count=len(tracks), **_pointing(answer))


def _pointing(answer: Written, count: int | None = None) -> dict[str, Any]:
    """Fields of `PointingAnswer`; `count` is the number that was asked for."""
    status: api.Status = "unreadable"
    if answer.grounding.count or count:
        status = "found"
    elif answer.grounding.is_explicit_none or count == 0:
        status = "none"
    return {"status": status, "found": status == "found", **answer.shared}


def _caption(answer: Written) -> api.CaptionAnswer:
    return api.CaptionAnswer(caption=answer.text.strip(), **answer.shared)


def _query(answer: Written) -> api.QueryAnswer:
    return api.QueryAnswer(answer=answer.text.strip(), grounding=answer.grounding, **answer.shared)


@dataclass(frozen=True, kw_only=True)
class VerbSpec:
    request: type[api.GenerationOptions]
    answer: type[api.VerbAnswer]
    read: Callable[[Written], api.VerbAnswer]
    summary: str
    form: AnswerForm | None = None
    """Of an answer that points."""


VERBS: dict[Verb, VerbSpec] = {
    "point": VerbSpec(
        request=api.PointRequest,
        answer=api.PointAnswer,
        read=_point,
        summary="Point at every object of a kind, in images or a video",
        form="point",
    ),
    "count": VerbSpec(
        request=api.CountRequest,
        answer=api.CountAnswer,
        read=_count,
        summary="Count objects of a kind, with a point on each",
        form="count",
    ),
    "track": VerbSpec(
        request=api.TrackRequest,
        answer=api.TrackAnswer,
        read=_track,
        summary="Follow objects through a video",
        form="track",
    ),
    "caption": VerbSpec(
        request=api.CaptionRequest,
        answer=api.CaptionAnswer,
        read=_caption,
        summary="Describe an image or a video",
    ),
    "query": VerbSpec(
        request=api.QueryRequest,
        answer=api.QueryAnswer,
        read=_query,
        summary="Answer a question about images or a video",
    ),
}
