"""Places between observations: on the line, in the order of time, never where none may be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core import api
from molmo_core.errors import InvalidRequest
from molmo_core.videos import VideoInfo
from molmo_server.answers.interpolation import interpolated, moments_between

INFO = VideoInfo(
    width_px=100,
    height_px=100,
    fps=10,
    duration_s=4.0,
    frame_times_s=tuple(k / 10 for k in range(40)),
    begin_s=0.0,
)
MEDIUM = api.Media(index=0, type="video", width=100, height=100)
SEEN = [k / 2 for k in range(9)]


def track(places: dict[float, float]) -> api.Track:
    points = [
        api.TrackPoint(t=t, frame=INFO.frame_at(t), x=x, y=0.5, pixel=api.Pixel(x=100 * x, y=50))
        for t, x in sorted(places.items())
    ]
    return api.Track(id=1, label="x", points=points)


def filled(places: dict[float, float], rate: float | None) -> list[api.TrackPoint]:
    at_s = moments_between(INFO, rate)
    [found] = interpolated([track(places)], at_s=at_s, seen_s=SEEN, info=INFO, medium=MEDIUM)
    return found.points


def test_every_frame_has_its_place() -> None:
    points = filled({0.5: 0.2, 1.0: 0.7}, None)
    assert [p.t for p in points] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [p.x for p in points] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert [p.frame for p in points] == [5, 6, 7, 8, 9, 10]
    assert [p.interpolated for p in points] == [False, True, True, True, True, False]


def test_one_observation_stays_alone() -> None:
    assert filled({1.0: 0.2}, None) == track({1.0: 0.2}).points


@given(
    seen=st.sets(st.sampled_from(SEEN), min_size=1),
    rate=st.one_of(st.none(), st.floats(0.5, 60)),
    x=st.lists(st.floats(0, 1), min_size=9, max_size=9),
)
def test_what_holds_for_all(seen: set[float], rate: float | None, x: list[float]) -> None:
    places = dict(zip(SEEN, x, strict=True))
    observed = {t: places[t] for t in seen}

    points = filled(observed, rate)

    assert [p for p in points if not p.interpolated] == track(observed).points
    assert all(a.t < b.t for a, b in pairwise(points))
    for point in (p for p in points if p.interpolated):
        before = max(t for t in SEEN if t <= point.t)
        assert {before, before + 0.5} <= seen
        low, high = sorted((places[before], places[before + 0.5]))
        assert low - 1e-6 <= point.x <= high + 1e-6
        assert point.pixel.x == pytest.approx(100 * point.x, abs=0.01)


def test_too_many_places_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="allowed are 50,000; interpolate at a lower rate"):
        interpolated(
            [track({0.0: 0, 3.9: 1})] * 10,
            at_s=moments_between(INFO, 1e4),
            seen_s=SEEN,
            info=INFO,
            medium=MEDIUM,
        )
