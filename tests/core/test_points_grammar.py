"""Grammars of answers: what `render` writes is allowed, what the parser would warn of is not."""

from __future__ import annotations

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from molmo_core.points import PointGroup, TrackFrame, render_answer, render_points, render_tracks
from molmo_core.points.grammar import frame_texts, points_grammar, tracks_grammar
from molmo_core.points.parser import parse_grounding

TIMES_S = (0.0, 0.5, 1.0, 1.5, 1.6)
_XY = st.tuples(st.floats(0, 1), st.floats(0, 1))
_LABEL = st.text(
    st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="<>"), min_size=1
).filter(lambda text: text.strip() == text)


def compiled(text: str) -> xgrammar.Grammar:
    return xgrammar.Grammar.from_ebnf(text)


def allows(grammar: xgrammar.Grammar, text: str) -> bool:
    allowed: bool = _is_grammar_accept_string(grammar, text)
    return allowed


POINTS = compiled(points_grammar(n_media=3, max_points=12))
COUNTED = compiled(points_grammar(n_media=3, max_points=12, is_counted=True))
MOMENTS = compiled(points_grammar(times_s=TIMES_S, max_points=12))
LONG = compiled(points_grammar(times_s=TIMES_S, max_points=12, is_ordered=False))
TRACKS = compiled(tracks_grammar(TIMES_S, max_objects=4))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(_XY, max_size=4), min_size=3, max_size=3), _LABEL)
def test_every_rendered_answer_about_images_is_allowed(
    places: list[list[tuple[float, float]]], label: str
) -> None:
    groups = [PointGroup(points=points, media_index=k) for k, points in enumerate(places)]
    n_points = sum(map(len, places))
    tag = render_points(groups, label)
    assert allows(POINTS, render_answer("pointing", tag=tag, n_points=n_points))
    assert allows(COUNTED, render_answer("point_count", tag=tag, n_points=n_points))
    timed = [
        PointGroup(points=g.points, time_s=t) for g, t in zip(groups, TIMES_S[1:], strict=False)
    ]
    answer = render_answer(None, tag=render_points(timed, label), n_points=n_points)
    assert allows(MOMENTS, answer)
    assert allows(LONG, answer)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 3), _XY), min_size=5, max_size=5), _LABEL)
def test_every_rendered_track_is_allowed(
    places: list[dict[int, tuple[float, float]]], label: str
) -> None:
    frames = [TrackFrame(time_s=t, points=p) for t, p in zip(TIMES_S, places, strict=True)]
    text = render_tracks(frames, label) or "No tracks available."
    assert allows(TRACKS, text)
    assert parse_grounding(text, media="video").warnings == ()


@pytest.mark.parametrize(
    "coords",
    [
        "1 1 250 50",  # a digit is lost
        "1 1 250 1001",
        "1 2 250 500",  # ids begin at 1
        "1 1 250 500 3 100 100",  # and count on
        "1 1 250 500;2 1 100 100",  # over all images
        "4 1 250 500",  # there are three images
        "2 1 250 500;1 2 100 100",  # in order
        "1 1 250 500;1 2 100 100",
        "",
        "1 1 250 500 ",
    ],
)
def test_what_the_parser_would_warn_of_cannot_be_decoded(coords: str) -> None:
    assert not allows(POINTS, f'<points coords="{coords}">stars</points>')


@pytest.mark.parametrize(
    "text",
    [
        'Counting the <points coords="1 1 250 500">star</points> shows a total of 2.',
        'Counting the <points coords="1 1 250 500">star</points> shows a total of 1',
        '<points coords="1 1 250 500">star</points>',
        "There are none",
        "There are none. ",
        "",
    ],
)
def test_the_count_agrees_and_the_sentence_ends(text: str) -> None:
    assert not allows(COUNTED, text)


@pytest.mark.parametrize(
    "coords",
    [
        "0.2 1 250 500",  # no frame of it
        "0.5 1 250 500;0.0 1 100 100",  # back in time
        "0.5 1 250 500;0.5 2 100 100",
        "0.5 2 250 500 1 100 100",  # ids ascend in a frame
        "0.5 5 250 500",  # four objects at most
        "0.5",
    ],
)
def test_tracks_stay_in_their_frames(coords: str) -> None:
    assert not allows(TRACKS, f'<tracks coords="{coords}">dog</tracks>')


def test_more_points_than_allowed_cannot_be_decoded() -> None:
    coords = " ".join(f"{k} 100 100" for k in range(1, 14))
    assert not allows(POINTS, f'<points coords="1 {coords}">x</points>')
    assert allows(POINTS, f'<points coords="1 {coords.removesuffix(" 13 100 100")}">x</points>')


def test_moments_that_are_written_alike_are_one() -> None:
    assert frame_texts((0.0, 0.04, 0.5, 0.52)) == ["0.0", "0.5"]
    with pytest.raises(ValueError, match="must ascend"):
        frame_texts((1.0, 0.5))


def test_what_makes_no_grammar() -> None:
    with pytest.raises(ValueError, match="got 0 images"):
        points_grammar(n_media=0, max_points=4)
    with pytest.raises(ValueError, match="max_points 0"):
        points_grammar(max_points=0)
    with pytest.raises(ValueError, match="got 0 moments"):
        tracks_grammar(())


def test_of_long_videos_only_the_order_of_moments_is_left_open() -> None:
    back = '<points coords="0.5 1 100 100;0.0 2 100 100">x</points>'
    assert allows(LONG, back)
    assert not allows(MOMENTS, back)
    for wrong in ("0.5 2 100 100", "0.2 1 100 100", "0.5 1 100 100;1.0 1 100 100"):
        assert not allows(LONG, f'<points coords="{wrong}">x</points>')
