"""Several answers about the same media as one: of several objects, or of tracks gone on with.

Knows: answers of the verbs that point. Does not know: how they came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from molmo_core import api

Answer = TypeVar("Answer", bound=api.PointingAnswer)
Placed = TypeVar("Placed", api.Point, api.GroundingWarning)


def of_objects(labels: Sequence[str], answers: Sequence[Answer]) -> Answer:
    """All places together, and each object's by itself in `objects`."""
    objects = [
        api.OneObject(
            object=label,
            status=answer.status,
            count=answer.count,
            points=getattr(answer, "points", []),
            tracks=getattr(answer, "tracks", []),
            text=answer.text,
            finish_reason=answer.finish_reason,
            warnings=answer.warnings,
            checkpoint=answer.checkpoint,
        )
        for label, answer in zip(labels, answers, strict=True)
    ]
    counts = [one.count for one in objects]
    is_counted = all(count is not None for count in counts)
    return _together(
        answers,
        {
            "objects": objects,
            "count": sum(filter(None, counts)) if is_counted else None,
            "tracks": [track for one in objects for track in one.tracks],
        },
    )


def of_points(answers: Sequence[api.TrackAnswer]) -> api.TrackAnswer:
    """Tracks that go on from given points: the id of each says from which, from 1."""
    tracks = [
        track.model_copy(update={"id": number})
        for number, answer in enumerate(answers, 1)
        for track in answer.tracks
    ]
    return _together(answers, {"tracks": tracks, "count": len(tracks)})


def _together(answers: Sequence[Answer], fields: dict[str, Any]) -> Answer:
    """The first answer with what all of them say, and `fields` where it has them."""
    statuses = {answer.status for answer in answers}
    status = next(s for s in ("found", "unreadable", "none") if s in statuses)
    points: list[api.Point] = []
    warnings: list[api.GroundingWarning] = []
    start = 0
    for answer in answers:
        points += _moved(getattr(answer, "points", []), start)
        warnings += _moved(answer.warnings, start)
        start += len(answer.text) + 1
    finish_reasons = [answer.finish_reason for answer in answers]
    first = answers[0]
    merged = {
        "text": "\n".join(answer.text for answer in answers),
        "status": status,
        "found": status == "found",
        "points": points,
        "warnings": warnings,
        "finish_reason": "length" if "length" in finish_reasons else first.finish_reason,
        "usage": _sum([answer.usage for answer in answers]),
        **fields,
    }
    known = type(first).model_fields
    return first.model_copy(update={k: v for k, v in merged.items() if k in known})


def _moved(placed: Sequence[Placed], by: int) -> list[Placed]:
    return [one.model_copy(update={"span": (one.span[0] + by, one.span[1] + by)}) for one in placed]


def _sum(usages: Sequence[api.Usage]) -> api.Usage:
    details = [usage.prompt_tokens_details for usage in usages if usage.prompt_tokens_details]
    return api.Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=api.PromptTokensDetails(
            cached_tokens=_total(one.cached_tokens for one in details),
            image_tokens=_total(one.image_tokens for one in details),
            video_tokens=_total(one.video_tokens for one in details),
        )
        if details
        else None,
    )


def _total(counts: Iterable[int | None]) -> int | None:
    """None when none of them is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
