"""Writing points and tracks as trained, and reading them back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from molmo_core.points import (
    NO_TRACKS_TEXT,
    PointGroup,
    TrackFrame,
    parse_grounding,
    render_answer,
    render_points,
    render_tracks,
)

# Fixed examples, so that a failure can be seen again.
PROPERTY = settings(derandomize=True, max_examples=150, deadline=None)

PER_MILLE = st.integers(0, 1000)
XYS = st.lists(st.tuples(PER_MILLE, PER_MILLE), min_size=1, max_size=5)
TENTHS_OF_SECOND = st.integers(0, 6000)
LABELS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            ['"', "'", "<", ">", "/", "=", "&", "&lt;", "&amp;#34;", "</points>", "<tracks ", "a "]
        ),
        max_size=8,
    ).map("".join),
)

# Rendering: vectors of the training specification, appendix A.3.


@pytest.mark.parametrize(
    ("mode", "groups", "label", "expected"),
    [
        (
            "point_count",
            [PointGroup(points=[(50, 20), (10.04, 99.99), (10.0, 5)], scale_xy=(100, 100))],
            "Red Car",
            'Counting the <points coords="1 1 100 050 2 100 1000 3 500 200">red car</points>'
            " shows a total of 3.",
        ),
        (
            "pointing",
            [PointGroup(points=[(50, 20)], scale_xy=(100, 100))],
            "x",
            '<points coords="1 1 500 200">x</points>',
        ),
        (
            "multi_image_count_then_point",
            [
                PointGroup(points=[(1, 2)], scale_xy=(100, 100)),
                PointGroup(points=[], media_index=1),
                PointGroup(points=[(30, 40), (3, 4)], media_index=2, scale_xy=(100, 100)),
            ],
            "cat",
            'There are 3 <points coords="1 1 010 020;3 2 030 040 3 300 400">cat</points>.',
        ),
        (
            "video_point_count",
            [
                PointGroup(points=[(50, 50)], time_s=0.0, scale_xy=(100, 100)),
                PointGroup(points=[(20, 10), (10, 90)], time_s=2.5, scale_xy=(100, 100)),
            ],
            "dog",
            'Counting the <points coords="0.0 1 500 500;2.5 2 100 900 3 200 100">dog</points>'
            " shows a total of 3.",
        ),
        ("video_count", [PointGroup(points=[(0.5, 0.5), (0.1, 0.1)])], "dog", "2"),
        ("point_count", [PointGroup(points=[])], "dog", "There are none."),
        ("count", [], "dog", "There are none."),
    ],
)
def test_answers_are_rendered_as_trained(
    mode: str, groups: list[PointGroup], label: str, expected: str
) -> None:
    tag = render_points(groups, label, lower_label=True)
    n_points = sum(len(group.points) for group in groups)
    assert render_answer(mode, tag=tag, n_points=n_points) == expected


def test_tracks_are_rendered_as_trained() -> None:
    frames = [
        TrackFrame(time_s=1.0, points={0: (10, 100), 1: (72, 50)}, scale_xy=(1280, 720)),
        TrackFrame(time_s=0.0, points={0: (640, 100), 1: (64, 50)}, scale_xy=(1280, 720)),
        TrackFrame(time_s=0.5, points={1: (70, 50)}, scale_xy=(1280, 720)),
        TrackFrame(time_s=0.7, points={}),
    ]
    coords = "0.0 1 050 069 2 500 139;0.5 1 055 069;1.0 1 056 069 2 008 139"
    assert render_tracks(frames, "cars") == f'<tracks coords="{coords}">cars</tracks>'
    tabbed = coords.replace(";", "\t")
    assert (
        render_tracks(frames, "cars", tag_format="html-v1", alt="all")
        == f'<tracks alt="all" coords="{tabbed}">cars</tracks>'
    )
    assert render_answer("point", tag="", n_points=0, none_text=NO_TRACKS_TEXT) == NO_TRACKS_TEXT


def test_points_outside_are_clipped_only_on_request() -> None:
    groups = [PointGroup(points=[(-5, 101)], scale_xy=(100, 100))]
    assert render_points(groups, "x", clip=True) == '<points coords="1 1 000 1000">x</points>'
    with pytest.raises(ValueError, match=r"outside 0\.\.\(100, 100\)"):
        render_points(groups, "x")
    with pytest.raises(ValueError, match="not a moment"):
        render_tracks([TrackFrame(time_s=-1.0, points={0: (0, 0)})], "x")
    with pytest.raises(ValueError, match="unknown answer mode 'boxes'"):
        render_answer("boxes", tag="x", n_points=1)


# Round trips


@PROPERTY
@given(
    xys_by_image=st.dictionaries(st.integers(0, 5), XYS, min_size=1),
    label=LABELS,
    alt=st.none() | LABELS,
    tag_format=st.sampled_from(["html-v1", "html-v2"]),
)
@example(xys_by_image={0: [(1, 2)]}, label="a=", alt='x coords="1 1 9 9" y=', tag_format="html-v2")
def test_image_points_survive_the_round_trip(
    xys_by_image: dict[int, Any], label: str, alt: str | None, tag_format: Any
) -> None:
    groups = [
        PointGroup(points=xys, media_index=index, scale_xy=(1000, 1000))
        for index, xys in sorted(xys_by_image.items())
    ]
    text = render_points(groups, label, alt=alt, tag_format=tag_format)
    n_points = sum(len(group.points) for group in groups)
    grounding = parse_grounding(
        render_answer("point_count", tag=text, n_points=n_points), n_media=6
    )
    expected = [
        (group.media_index, None, x / 1000, y / 1000)
        for group in groups
        for x, y in sorted(group.points)
    ]
    assert [(p.media_index, p.time_s, p.x, p.y) for p in grounding.points] == expected
    assert [p.id for p in grounding.points] == list(range(1, n_points + 1))
    assert {(p.label, p.alt, p.kind) for p in grounding.points} == {(label, alt, "point")}
    assert (grounding.count, grounding.declared_count) == (n_points, n_points)
    assert {warning.code for warning in grounding.warnings} <= {"duplicate_point"}
    # What was read writes the same text again.
    again = [
        PointGroup(
            points=[(p.x, p.y) for p in grounding.points if p.media_index == group.media_index],
            media_index=group.media_index,
        )
        for group in groups
    ]
    assert render_points(again, label, alt=alt, tag_format=tag_format) == text


@PROPERTY
@given(xys_by_tenth=st.dictionaries(TENTHS_OF_SECOND, XYS, min_size=1, max_size=6), label=LABELS)
def test_video_points_survive_the_round_trip(xys_by_tenth: dict[int, Any], label: str) -> None:
    groups = [
        PointGroup(points=xys, time_s=tenths / 10, scale_xy=(1000, 1000))
        for tenths, xys in sorted(xys_by_tenth.items())
    ]
    grounding = parse_grounding(render_points(groups, label), media="video")
    expected = [
        (group.time_s, x / 1000, y / 1000) for group in groups for x, y in sorted(group.points)
    ]
    assert [(p.time_s, p.x, p.y) for p in grounding.points] == expected
    assert {(p.label, p.media_index) for p in grounding.points} == {(label, 0)}


@PROPERTY
@given(
    frames=st.dictionaries(
        TENTHS_OF_SECOND,
        st.dictionaries(st.sampled_from("abcdef"), st.tuples(PER_MILLE, PER_MILLE), min_size=1),
        min_size=1,
        max_size=6,
    ),
    label=LABELS,
)
def test_tracks_survive_the_round_trip(frames: dict[int, dict[str, Any]], label: str) -> None:
    rendered = render_tracks(
        [
            TrackFrame(time_s=tenths / 10, points=xys, scale_xy=(1000, 1000))
            for tenths, xys in frames.items()
        ],
        label,
    )
    grounding = parse_grounding(rendered, media="video")
    expected = {
        tuple(
            (tenths / 10, xys[key][0] / 1000, xys[key][1] / 1000)
            for tenths, xys in sorted(frames.items())
            if key in xys
        )
        for key in {key for xys in frames.values() for key in xys}
    }
    tracks = [tuple((p.time_s, p.x, p.y) for p in track.points) for track in grounding.tracks]
    assert set(tracks) == expected
    assert [track.id for track in grounding.tracks] == list(range(1, len(tracks) + 1))
    first_sightings = [(moments[0][0], moments[0][1:]) for moments in tracks]
    assert first_sightings == sorted(first_sightings)
    assert {track.label for track in grounding.tracks} == {label}
    assert grounding.warnings == ()
