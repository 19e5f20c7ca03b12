"""Reading points and tracks: golden edge cases, any chunking, any text, linear work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.points import Grounding, GroundingParser, Point, parse_grounding

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "grammar.json").read_text())
# Fixed examples, so that a failure can be seen again.
PROPERTY = settings(derandomize=True, max_examples=150, deadline=None)

FRAGMENTS = [
    *["<points", "<tracks", "<POINT", ' coords="', " alt='", ' alt="', '"', "'", ">", "/>", "</"],
    *["</points>", "</tracks>", ";", "\t", " ", "\n", "1", "12.5", "0", "1000", "1001", "100"],
    *["512", "34", "7a", "=", "<", "boats", "There are 2 ", "shows a total of 3", "\x00", "é", "٣"],
]
TAG_SOUP = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
ANY_TEXT = st.one_of(st.text(max_size=200), TAG_SOUP)
OPTIONS = st.fixed_dictionaries(
    {
        "media": st.sampled_from(["image", "video"]),
        "n_media": st.integers(0, 3),
        "legacy": st.booleans(),
    }
)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_case(case: dict[str, Any]) -> None:
    grounding = parse_grounding(case["text"], **case["options"])
    assert _described(grounding) == case["expected"]
    assert grounding.count == len(grounding.points) + len(grounding.tracks)


def _described(grounding: Grounding) -> dict[str, Any]:
    return {
        "points": [_described_point(point) for point in grounding.points],
        "tracks": [
            {
                "id": track.id,
                "label": track.label,
                "points": [[point.time_s, point.x, point.y] for point in track.points],
            }
            for track in grounding.tracks
        ],
        "declared_count": grounding.declared_count,
        "is_explicit_none": grounding.is_explicit_none,
        "warnings": [warning.code for warning in grounding.warnings],
    }


def _described_point(point: Point) -> dict[str, Any]:
    where: dict[str, Any] = (
        {"media_index": point.media_index} if point.time_s is None else {"time_s": point.time_s}
    )
    return {"id": point.id, "x": point.x, "y": point.y, **where, "label": point.label}


# Streaming


@PROPERTY
@given(text=ANY_TEXT, options=OPTIONS, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_chunks_do_not_change_the_result(text: str, options: Any, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = GroundingParser(**options)
    whole_fed = whole.feed(text)
    chunked = GroundingParser(**options)
    chunked_fed = [
        point for start, end in pairwise(edges) for point in chunked.feed(text[start:end])
    ]
    assert chunked_fed == whole_fed
    assert chunked.close() == whole.close()
    single = GroundingParser(**options)
    assert [point for char in text for point in single.feed(char)] == whole_fed
    assert single.close() == whole.close()


ANSWERS = [
    ("image", 'Counting the <points coords="1 1 512 340 2 700 105">boats</points> shows a tota'),
    ("image", '<points alt="a coords="1 1 9 9" b" coords="1 1 000 1000;3 2 100 100 3 100 1000">x'),
    (
        "video",
        '<tracks coords="0.0 1 200 300 2 700 310;1.5 1 210 305\t2.0 2 1000 001">a <b</tracks>',
    ),
]


@pytest.mark.parametrize(("media", "answer"), ANSWERS)
def test_every_prefix_yields_exactly_its_complete_triples(media: Any, answer: str) -> None:
    whole = parse_grounding(answer, media=media, n_media=3).observations
    assert len(whole) >= 2
    for length in range(len(answer) + 1):
        prefix = answer[:length]
        # Complete: a character follows y, or y has all digits it can have.
        expected = [
            point.span
            for point in whole
            if point.span[1] < length
            or (point.span[1] == length and answer[point.span[1] - 3 : length] != "100")
        ]
        # In the middle of `1000`, `100` is not yet a coordinate, and is never taken for one.
        found = parse_grounding(prefix, media=media, n_media=3).observations
        assert [point.span for point in found] == expected, prefix
        by_span = {point.span: point for point in whole}
        assert all((p.x, p.y) == (by_span[p.span].x, by_span[p.span].y) for p in found)


def test_observations_arrive_as_soon_as_they_are_complete() -> None:
    parser = GroundingParser(media="video")
    assert parser.feed('<tracks coords="0.5 1 200 300') == []
    (first,) = parser.feed(" ")
    assert (first.id, first.x, first.y, first.time_s) == (1, 0.2, 0.3, 0.5)
    assert (first.label, first.kind, first.span) == (None, "track", (20, 29))
    (second,) = parser.feed("2 700 310;1.0")
    assert (second.id, second.x, second.y) == (2, 0.7, 0.31)
    (third,) = parser.feed(' 1 210 305">dog</tracks>')
    grounding = parser.close()
    assert [point.span for point in grounding.observations] == [
        point.span for point in (first, second, third)
    ]
    assert {track.label for track in grounding.tracks} == {"dog"}
    assert parser.close() is grounding
    with pytest.raises(RuntimeError, match="closed"):
        parser.feed("x")


# Prose and broken text


@PROPERTY
@given(
    text=st.one_of(st.text(max_size=300), st.text(alphabet="0123456789 .,;()[]{}xy=", max_size=80))
)
def test_prose_never_becomes_points(text: str) -> None:
    grounding = parse_grounding(text)
    assert grounding.observations == ()
    assert grounding.count == 0


@PROPERTY
@given(text=ANY_TEXT, options=OPTIONS)
def test_no_text_raises_and_every_value_is_in_range(text: str, options: Any) -> None:
    grounding = parse_grounding(text, **options)
    for point in grounding.observations:
        assert 0.0 <= point.x <= 1.0
        assert 0.0 <= point.y <= 1.0
        assert 0 <= point.span[0] < point.span[1] <= len(text)
        if options["media"] == "image" and not options["legacy"]:
            assert 0 <= point.media_index < options["n_media"]
    for warning in grounding.warnings:
        assert 0 <= warning.span[0] <= warning.span[1] <= len(text)


@pytest.mark.parametrize(
    ("text", "label", "alt"),
    [
        ('<points alt="5" pipe" coords="1 1 300 400">x</points>', "x", '5" pipe'),
        ("<points alt='it''s' coords='1 1 300 400'>x</points>", "x", "it''s"),
        ('<points coords="1 1 300 400" alt="after">x</points>', "x", "after"),
        (
            '<points coords="1 1 300 400">R&amp;D &lt;3 &copy AT&T</points>',
            "R&D <3 &copy AT&T",
            None,
        ),
        ('<points coords="1 1 300 400">a < b </point>', "a < b ", None),
        ('<points coords="1 1 300 400"/> no label', None, None),
        ('<points coords="1 1 300 400>x</points>', "x", None),
        ('<points coords="1 1 300 400">x</poi', "x", None),
        ('<points coords="1 1 300 400">two words \nNext line', "two words", None),
        ('<points coords="1 1 300 400">x <points coords="1">y</points>', "x", None),
    ],
)
def test_label_and_alt(text: str, label: str | None, alt: str | None) -> None:
    (point,) = parse_grounding(text).points
    assert (point.x, point.y, point.label, point.alt) == (0.3, 0.4, label, alt)


def test_text_after_a_broken_tag_is_read() -> None:
    broken = '<points alt="5 pipe coords="1 1 300 400">b</points>'
    grounding = parse_grounding(broken + '<points coords="1 1 512 340">c</points>')
    assert [(point.label, point.x) for point in grounding.points] == [("c", 0.512)]
    assert [warning.code for warning in grounding.warnings] == ["malformed_tag"]
    prose = "<points " + "of view " * 600 + 'coords="1 1 512 340">c</points>'
    assert parse_grounding(prose).points == ()
    endless = '<points alt="' + "a" * 5000 + ' <points coords="1 1 512 340">c</points>'
    assert [point.x for point in parse_grounding(endless).points] == [0.512]


def test_counts_of_several_tags_are_summed() -> None:
    first = 'Counting the <points coords="1 1 512 340">boats</points> shows a total of 1.'
    second = ' There are 2 <points coords="1 1 100 200 2 300 400">cats</points>.'
    grounding = parse_grounding(first + second)
    assert (grounding.declared_count, grounding.count, grounding.warnings) == (3, 3, ())
    assert parse_grounding("Counting the boats shows a total of 7.").declared_count == 7
    assert parse_grounding("It weighs 3.5 kg.").declared_count is None
    assert parse_grounding("-3").declared_count is None


def test_one_object_in_two_tags_is_one_track() -> None:
    tag = '<tracks coords="0.5 1 200 300">dog</tracks>'
    other = '<tracks coords="0.5 1 100 300">cat</tracks>'
    grounding = parse_grounding(tag + tag + other, media="video")
    assert [(track.id, track.label) for track in grounding.tracks] == [(1, "dog"), (1, "cat")]
    assert [warning.code for warning in grounding.warnings] == ["duplicate_id"]


def test_an_object_twice_in_a_frame_arrives_once() -> None:
    parser = GroundingParser(media="video")
    (first,) = parser.feed('<tracks coords="0.5 1 200 300 1 700 310">dog</tracks>')
    assert (first.id, first.x) == (1, 0.2)


def test_a_negative_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="n_media is -1"):
        GroundingParser(n_media=-1)


# Linear work

HOSTILE = {
    "points": lambda n: '<points coords="1' + " 1 512 340" * n + '">x</points>',
    "open tags": lambda n: "<points " * n,
    "open quotes": lambda n: '<points alt="' * n,
    "closed heads": lambda n: "<points a>" * n,
    "open labels": lambda n: '<points coords="1 1 512 340">x' * n,
    "angles": lambda n: "<" * n,
    "digits": lambda n: '<points coords="' + "1" * n,
    "spaces": lambda n: "3" + " " * n + "x",
    "counting": lambda n: "Counting the " * n,
    "legacy tags": lambda n: '<points x1="1.0" alt="a\t' * n,
    "legacy times": lambda n: "time 1.0\n{0: [" * n,
    "legacy objects": lambda n: "0: ([1, 2, " * n,
    "pairs": lambda n: "(1.0, " * n,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("media", ["image", "video"])
def test_work_per_character_does_not_grow(hostile: Callable[[int], str], media: Any) -> None:
    small, large = hostile(500), hostile(2000)
    growth = len(large) / len(small)
    assert _n_calls(large, media) <= 1.2 * growth * _n_calls(small, media)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_long_text_takes_no_quadratic_time(hostile: Callable[[int], str]) -> None:
    # Regular expressions do their work inside one call. Linear: about 0.1 s; quadratic: minutes.
    text = hostile(100_000 // len(hostile(1)) + 1) if len(hostile(1)) < 50 else hostile(10_000)
    before_s = time.process_time()
    parse_grounding(text, legacy=True)
    parse_grounding(text, media="video", legacy=True)
    assert time.process_time() - before_s < 5.0


def _n_calls(text: str, media: Any) -> int:
    """Calls of Python and C functions while `text` is fed one character at a time."""
    parser = GroundingParser(media=media, legacy=True)
    n_calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for char in text:
            parser.feed(char)
        parser.close()
    finally:
        sys.setprofile(before)
    return n_calls
