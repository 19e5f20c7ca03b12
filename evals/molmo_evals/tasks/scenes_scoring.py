"""What answers about drawn scenes are worth.

Knows: the answer types, the true places and names. Does not know: sampling, requests.
Source: the acceptance lines of the project.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from molmo_core import api
from molmo_core.clips import Clip
from molmo_core.scenes import COLOURS, SHAPES, Query, Scene, describe
from molmo_evals.metrics.points import HIT_SHARE_OF_DIAGONAL, XY, Tally, count_hits, match, total
from molmo_evals.task import Score

_NAMED = re.compile(
    rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:at|on|in) the "
    r"(top left|top right|top|left|centre|right|bottom left|bottom right|bottom)\b"
)


def f1_score(tally: Tally) -> Score:
    return Score(
        numbers={
            "n_hits": tally.n_hits,
            "n_predicted": tally.n_predicted,
            "n_true": tally.n_true,
        }
    )


def mean_score(value: float) -> Score:
    return Score(numbers={"value": value})


def right_or_wrong(is_right: bool) -> Score:
    return Score(numbers={"value": float(is_right)})


def points_score(answer: api.PointAnswer, some: Sequence[Scene], query: Query) -> Score:
    """Points are compared picture by picture: one in the wrong picture is a miss."""
    tallies = [
        match(
            [
                (point.x * scene.width_px, point.y * scene.height_px)
                for point in answer.points
                if point.media_index == index
            ],
            [(item.x_px, item.y_px) for item in scene.objects if query.matches(item)],
            (scene.width_px, scene.height_px),
        )
        for index, scene in enumerate(some)
    ]
    return f1_score(total(tallies))


def caption_score(answer: api.CaptionAnswer, scene: Scene) -> Score:
    """Phrases `colour shape place`; a sentence without any, for an empty scene, is right."""
    named, true = named_objects(answer.caption), named_objects(describe(scene))
    return f1_score(
        Tally(n_hits=(named & true).total(), n_predicted=named.total(), n_true=true.total())
    )


def named_objects(caption: str) -> Counter[tuple[str, ...]]:
    return Counter(_NAMED.findall(" ".join(caption.lower().split())))


def same_word(answer: str, right: str) -> bool:
    """Whatever the case, an article and a full stop."""
    words = re.sub(r"[^a-z ]", "", answer.lower()).split()
    return [word for word in words if word not in ("a", "an", "the")] == [right]


def video_points_score(answer: api.PointAnswer, clip: Clip, query: Query) -> Score:
    """Each object once, at any moment: an id's first point, against the places at its time."""
    first_of_id: dict[int, api.Point] = {}
    for point in answer.points:
        first_of_id.setdefault(point.id, point)
    points = list(first_of_id.values())
    n_true = sum(query.matches(item) for item in clip.objects)
    if not points:
        return f1_score(Tally(n_true=n_true))
    limit_px = HIT_SHARE_OF_DIAGONAL * float(np.hypot(clip.width_px, clip.height_px))
    distances = np.array(
        [
            [
                np.hypot(point.x * clip.width_px - x_px, point.y * clip.height_px - y_px)
                for x_px, y_px in _true_places(clip, query, point.t or 0.0)
            ]
            for point in points
        ]
    )
    hits = count_hits(distances / limit_px) if n_true else 0
    return f1_score(Tally(n_hits=hits, n_predicted=len(points), n_true=n_true))


def tracks_score(answer: api.TrackAnswer, clip: Clip, query: Query) -> Score:
    """F1 of every frame that the model saw, averaged; a point counts in the frame nearest in
    time. Without frames the answer is worth nothing."""
    times_s = np.array([frame.time for frame in answer.frames])
    if not len(times_s):
        return mean_score(0.0)
    predicted: list[list[XY]] = [[] for _ in times_s]
    for track in answer.tracks:
        for at in track.points:
            nearest = int(np.abs(times_s - at.t).argmin())
            predicted[nearest].append((at.x * clip.width_px, at.y * clip.height_px))
    size_px = (clip.width_px, clip.height_px)
    frames = zip(predicted, times_s, strict=True)
    values = [match(here, _true_places(clip, query, float(t)), size_px).f1 for here, t in frames]
    return mean_score(float(np.mean(values)))


def _true_places(clip: Clip, query: Query, time_s: float) -> list[XY]:
    """In pixels, in the frame that is displayed at `time_s`."""
    index = min(max(int((time_s + 1e-6) * clip.fps), 0), clip.n_frames - 1)
    places = clip.positions(index / clip.fps)
    return [xy for xy, item in zip(places, clip.objects, strict=True) if query.matches(item)]
