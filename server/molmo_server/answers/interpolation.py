"""Places of a track between those that the model saw.

In a straight line and evenly in time between two observations of one object, never before the first
or behind the last, and not over a moment that the model saw without it.

Knows: tracks, times. Does not know: requests, text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from molmo_core import api
from molmo_core.api_grounding import pixel_at
from molmo_core.errors import InvalidRequest
from molmo_core.videos import VideoInfo

MOST_PLACES = 50_000
_ROUNDING_S = 0.0501
"""Moments are written in tenths of a second."""
_SAME_S = 1e-6
_PLACE_DIGITS = 6


def moments_between(info: VideoInfo, rate: float | None) -> list[float]:
    """Seconds: every 1/`rate` from the start, or every frame of the file."""
    if rate is None:
        return list(info.frame_times_s)
    return [float(t) for t in np.arange(0, info.duration_s, 1 / rate)]


def interpolated(
    tracks: Sequence[api.Track],
    *,
    at_s: Sequence[float],
    seen_s: Sequence[float],
    info: VideoInfo,
    medium: api.Media,
) -> list[api.Track]:
    """The tracks with places at the moments `at_s` added; `seen_s` are those of the answer.

    Both ascend. Raises InvalidRequest for more than `MOST_PLACES`.
    """
    n_most = sum(
        bisect_right(at_s, track.points[-1].t) - bisect_left(at_s, track.points[0].t)
        for track in tracks
    )
    if n_most > MOST_PLACES:
        raise InvalidRequest(
            f"up to {n_most:,} places would be between the observations, allowed are "
            f"{MOST_PLACES:,}; interpolate at a lower rate",
            param="interpolate",
        )
    return [_filled(track, at_s, seen_s, info, medium) for track in tracks]


def _filled(
    track: api.Track,
    at_s: Sequence[float],
    seen_s: Sequence[float],
    info: VideoInfo,
    medium: api.Media,
) -> api.Track:
    points = track.points[:1]
    for before, after in pairwise(track.points):
        if not _is_gap(before.t, after.t, seen_s):
            inside = at_s[
                bisect_right(at_s, before.t + _SAME_S) : bisect_left(at_s, after.t - _SAME_S)
            ]
            points += [_between(before, after, t, info, medium) for t in inside]
        points.append(after)
    return track.model_copy(update={"points": points})


def _is_gap(before_s: float, after_s: float, seen_s: Sequence[float]) -> bool:
    """Whether the model saw a moment between the two, without the object."""
    first = bisect_right(seen_s, before_s + _ROUNDING_S)
    return first < len(seen_s) and seen_s[first] < after_s - _ROUNDING_S


def _between(
    before: api.TrackPoint,
    after: api.TrackPoint,
    time_s: float,
    info: VideoInfo,
    medium: api.Media,
) -> api.TrackPoint:
    share = (time_s - before.t) / (after.t - before.t)
    x = round(before.x + share * (after.x - before.x), _PLACE_DIGITS)
    y = round(before.y + share * (after.y - before.y), _PLACE_DIGITS)
    return api.TrackPoint(
        t=time_s,
        frame=info.frame_at(time_s),
        x=x,
        y=y,
        pixel=pixel_at(x, y, medium),
        interpolated=True,
    )
