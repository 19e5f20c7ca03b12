"""Points, counts and tracks of rows: appendix A.3, tasks and modes of section 4.2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from molmo_core.errors import InvalidExample
from molmo_training.data.formatting import PRETRAIN, SFT, FormatSettings, Formatter, RowMedia
from molmo_training.data.formatting.templates import template_groups

PICTURE = np.zeros((200, 400, 3), np.uint8)
ONE = RowMedia(images=[PICTURE])
THREE = RowMedia(images=[PICTURE] * 3)
TIMES_S = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
CLIP = RowMedia(frames=[PICTURE] * len(TIMES_S), frame_times_s=TIMES_S)
BARE = FormatSettings(prompt_templates="none", system_prompt="none")


def texts(
    row: dict[str, Any], media: RowMedia, settings: FormatSettings = SFT, seed: int = 0
) -> tuple[str, str]:
    (branch,) = Formatter(settings=settings)(row, np.random.default_rng(seed), media).branches
    question, answer = branch.turns
    return question.text, answer.text


def filled(group: str, **slots: str) -> set[str]:
    return {template.format(**slots) for template in template_groups()[group]}


# One image

CARS = {
    "style": "point_count",
    "label": "Red Car",
    "points": [(50, 20), (10.04, 99.99), (10.0, 5)],
    "point_scale": 100,
}
CARS_ELEMENT = '<points coords="1 1 100 050 2 100 1000 3 500 200">red car</points>'


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("point_count", f"Counting the {CARS_ELEMENT} shows a total of 3."),
        ("point_then_count", f"Counting the {CARS_ELEMENT} shows a total of 3."),
        ("count_then_point", f"There are 3 {CARS_ELEMENT}."),
        ("count", "3"),
        ("pointing", CARS_ELEMENT),
        ("cosyn_point", CARS_ELEMENT),
        ("refexp_pointing", CARS_ELEMENT),
    ],
)
def test_answers_about_an_image(style: str, expected: str) -> None:
    assert texts({**CARS, "style": style}, ONE, BARE) == ("red car", expected)
    assert texts({**CARS, "style": style, "points": []}, ONE, BARE)[1] == "There are none."


def test_questions_about_an_image() -> None:
    asked = {texts(CARS, ONE, seed=k)[0] for k in range(600)}
    assert asked == filled("point_count", label="red car")
    assert texts({**CARS, "label_cased": "Red Car"}, ONE, BARE)[0] == "Red Car"
    assert texts({**CARS, "question": "Cars?"}, ONE)[0] == "Cars?"
    assert texts(CARS, ONE, PRETRAIN)[0] == "point_count: red car"


def test_a_question_without_a_label_is_the_label() -> None:
    row = {"style": "cosyn_point", "question": "Where is B?", "points": [[100, 50]]}
    assert texts(row, ONE) == ("Where is B?", '<points coords="1 1 250 250">Where is B?</points>')
    assert texts(row, ONE, BARE)[0] == "Where is B?"


def test_units_of_points() -> None:
    row = {"style": "pointing", "label": "x", "points": [[100, 50]]}
    assert '"1 1 250 250"' in texts(row, ONE)[1]
    table = np.empty(1, dtype=object)  # as Parquet gives a list of lists
    table[0] = np.array([100, 50])
    assert '"1 1 250 250"' in texts({**row, "points": table}, ONE)[1]
    assert '"1 1 500 100"' in texts({**row, "width": 200, "height": 500}, ONE)[1]
    assert '"1 1 1000 500"' in texts({**row, "point_scale": 100}, RowMedia())[1]
    assert '"1 1 1000 250"' in texts({**row, "points": [[450, 50]], "clip_points": True}, ONE)[1]


@pytest.mark.parametrize(
    ("change", "media", "message"),
    [
        ({"points": [[450, 50]]}, ONE, "points inside their scale"),
        ({"points": [[1]]}, ONE, r"points as \[x, y\]"),
        ({"points": [["1", "2"]]}, ONE, r"points as \[x, y\]"),
        ({"points": [[float("nan"), 2]]}, ONE, r"points as \[x, y\]"),
        ({"points": None}, ONE, "'points' .* is missing; give a list"),
        ({"label": None}, ONE, "'label' .* is missing"),
        ({}, RowMedia(), "width and height, where there is no picture"),
        ({"point_scale": 0}, ONE, "a scale above 0"),
        ({"points": []}, RowMedia(images=[PICTURE], frames=[PICTURE]), "images and a video"),
    ],
)
def test_points_that_cannot_be_used(change: dict[str, Any], media: RowMedia, message: str) -> None:
    row = {"style": "pointing", "label": "x", "points": [[100, 50]], **change}
    with pytest.raises(InvalidExample, match=message):
        texts(row, media)


# Several images

CATS = {
    "style": "multi_image_point_then_count",
    "points_by_label": {"Cat": [[(1, 2)], [], [(30, 40), (3, 4)]]},
    "point_scale": 100,
}
ALL_IMAGES = FormatSettings(p_multi_point_all_image=1)


def test_points_of_all_images() -> None:
    question, answer = texts(CATS, THREE, ALL_IMAGES)
    coords = "1 1 010 020;3 2 030 040 3 300 400"
    assert answer == f'Counting the <points coords="{coords}">cat</points> shows a total of 3.'
    assert question in filled(CATS["style"], label="cat", images="all images")
    pretrained = FormatSettings(prompt_templates="none", pointing_format="html-v1")
    assert texts(CATS, THREE, pretrained, seed=3)[0] == "cat"


def test_points_of_some_images() -> None:
    settings = FormatSettings(p_multi_point_all_image=0)
    found = {texts(CATS, THREE, settings, k) for k in range(400)}
    named = {
        "image_1": '1 1 010 020">cat</points> shows a total of 1.',
        "image_2": "There are none.",
        "image_3": '3 1 030 040 2 300 400">cat</points> shows a total of 2.',
        "image_1, image_2": '1 1 010 020">cat</points> shows a total of 1.',
        "image_1, image_3": "shows a total of 3.",
        "image_2, image_3": "shows a total of 2.",
    }
    of = {
        question: images
        for images in named
        for question in filled(CATS["style"], label="cat", images=images)
    }
    assert {of[question] for question, _ in found} == set(named)
    assert all(answer.endswith(named[of[question]]) for question, answer in found)


def test_half_of_the_points_of_all_images_are_asked_for_plainly() -> None:
    row = {**CATS, "style": "multi_image_pointing"}
    asked = [texts(row, THREE, ALL_IMAGES, k)[0] for k in range(300)]
    plain = filled("pointing", label="cat")
    assert 110 < sum(question in plain for question in asked) < 190
    about = filled("multi_image_pointing", label="cat", images="all images")
    assert set(asked) <= plain | about


def test_a_label_is_drawn() -> None:
    by_label = {"cat": [[], [], []], "dog": [[(1, 2)], [], []]}
    row = {**CATS, "points_by_label": by_label}
    assert {texts(row, THREE, BARE, k)[0] for k in range(30)} == {"cat", "dog"}
    with pytest.raises(InvalidExample, match="points for each of the 2 images"):
        texts(row, RowMedia(images=[PICTURE] * 2))
    with pytest.raises(InvalidExample, match="an object of labels"):
        texts({**row, "points_by_label": None}, THREE)
    with pytest.raises(InvalidExample, match="an object of labels"):
        texts({**row, "points_by_label": {1: [[], [], []]}}, THREE)


# Videos

DOGS = {
    "style": "video_point_count",
    "label": "Dog",
    "point_scale": 100,
    "points": [
        {"time_s": 2.5, "points": [(20, 10), (10, 90)]},
        {"time_s": 0.0, "points": [(50, 50)]},
    ],
}


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("video_point_count", "Counting the {} shows a total of 3."),
        ("video_point", "{}"),
        ("video_count_point", "There are 3 {}."),
        ("video_count", "3"),
    ],
)
def test_points_of_a_video(style: str, expected: str) -> None:
    element = '<points coords="0.0 1 500 500;2.5 2 100 900 3 200 100">Dog</points>'
    row = {**DOGS, "style": style}
    assert texts(row, CLIP, BARE) == ("dog", expected.format(element))
    assert texts(row, CLIP)[0] in filled(style, label="Dog")
    assert texts({**row, "points": []}, CLIP)[1] == "There are none."


def test_what_cannot_be_counted() -> None:
    row = {**DOGS, "unanswerable": True}
    assert texts(row, CLIP)[1] == "Sorry, I can't count Dog."
    assert texts({**row, "explanation": "Too dark."}, CLIP)[1] == "Too dark."


# Tracks


def moment(time_s: float, *points: tuple[int, int, int] | tuple[int, int, int, bool]) -> Any:
    keys = ("id", "x", "y", "occluded")
    return {"time_s": time_s, "points": [dict(zip(keys, p, strict=False)) for p in points]}


TRACKS = {
    "style": "video_point_track_per_frame",
    "label": "cars",
    "width": 1280,
    "height": 720,
    "tracks": [
        moment(0.0, (0, 640, 100), (1, 64, 50)),
        moment(0.5, (0, 1, 1, True), (1, 70, 50)),
        moment(1.0, (0, 10, 100), (1, 72, 50)),
        moment(1.2, (1, 80, 50)),
    ],
}


def test_tracks_of_every_moment() -> None:
    coords = "0.0 1 050 069 2 500 139;0.5 1 055 069;1.0 1 056 069 2 008 139"
    asked = {texts(TRACKS, CLIP, seed=k) for k in range(400)}
    assert {answer for _, answer in asked} == {f'<tracks coords="{coords}">cars</tracks>'}
    named = filled(TRACKS["style"], label="cars", fps="2")
    assert "Track cars in 2 FPS" in named
    unnamed = filled("video_point_track_per_frame_default_fps", label="cars")
    assert {question for question, _ in asked} == named | unnamed


def test_tracks_at_another_rate() -> None:
    question, answer = texts({**TRACKS, "sampling_fps": 1}, CLIP)
    coords = "0.0 1 050 069 2 500 139;1.0 1 056 069 2 008 139"
    assert answer == f'<tracks coords="{coords}">cars</tracks>'
    assert question in filled(TRACKS["style"], label="cars", fps="1")


def test_only_moments_that_the_model_sees_are_asked_for() -> None:
    sees = RowMedia(frames=[PICTURE] * 2, frame_times_s=[0.0, 1.005])
    assert texts(TRACKS, sees)[1].count(";") == 1
    nothing = RowMedia(frames=[PICTURE], frame_times_s=[5.0])
    assert texts(TRACKS, nothing)[1] == "No tracks available."


@pytest.mark.parametrize("style", ["video_point_ground_start_end", "video_point_track_start_end"])
def test_the_first_and_the_last_moment(style: str) -> None:
    question, answer = texts({**TRACKS, "style": style}, CLIP)
    coords = "0.0 1 050 069 2 500 139;1.0 1 056 069 2 008 139"
    assert answer == f'<tracks coords="{coords}">cars</tracks>'
    prefix = "video_point_ground_start_end: " if "ground" in style else ""
    sentences = filled("video_point_ground_start_end", label="cars")
    assert question.removeprefix(prefix) in sentences
    assert "For each 'cars' in this video" in "".join(sentences)


SINGLE = {**TRACKS, "style": "video_single_point_track_per_frame", "object_id": 1}


def test_on_from_one_point() -> None:
    first = FormatSettings(p_random_query_point=0)
    question, answer = texts(SINGLE, CLIP, first)
    assert answer == '<tracks coords="0.5 1 055 069;1.0 1 056 069">cars</tracks>'
    point = '<points coords="0.0 1 050 069">cars</points>'
    sentences = filled(SINGLE["style"], input_points=point, fps="2")
    assert f"Track {point} in 2 FPS." in sentences
    assert question.removeprefix("video_single_point_track_per_frame: ") in sentences


def test_the_point_is_sometimes_another_moment_of_the_object() -> None:
    found = [texts(SINGLE, CLIP, seed=k) for k in range(600)]
    starts = [question.split('coords="')[1][:3] for question, _ in found]
    assert set(starts) == {"0.0", "0.5", "1.0"}
    assert 0.8 < starts.count("0.0") / len(starts) < 0.92
    behind = {start: answer for start, (_, answer) in zip(starts, found, strict=True)}
    assert behind["0.5"] == '<tracks coords="1.0 1 056 069">cars</tracks>'
    assert behind["1.0"] == "No tracks available."
    validating = FormatSettings(is_training=False)
    assert {texts(SINGLE, CLIP, validating, k)[1] for k in range(50)} == {behind["0.0"]}


def test_a_single_point_to_its_end() -> None:
    row = {**SINGLE, "style": "video_single_point_track_start_end"}
    _, answer = texts(row, CLIP, FormatSettings(p_random_query_point=0))
    assert answer == '<tracks coords="1.0 1 056 069">cars</tracks>'


def test_an_object_is_drawn_where_none_is_asked_for() -> None:
    row = {key: value for key, value in SINGLE.items() if key != "object_id"}
    asked = {texts(row, CLIP, BARE, seed=k)[0] for k in range(60)}
    assert {'<points coords="0.0 1 500 139">cars</points>'} < asked
    assert {'<points coords="0.0 1 050 069">cars</points>'} < asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object_id": 7}, "no point of object 7"),
        ({"tracks": [moment(0.0, (0, 2000, 1))], "object_id": 0}, "points inside their scale"),
        ({"tracks": [{"time_s": 0, "points": [{"x": 1, "y": 2}]}]}, "'id' .* is missing"),
        ({"tracks": [{"points": []}]}, "'time_s' .* is missing"),
        ({"tracks": [{"time_s": 0, "points": [{"id": [1], "x": 1, "y": 2}]}]}, "keeps over the"),
        ({"tracks": None}, "'tracks' .* is missing"),
        ({"sampling_fps": -1}, "a rate above 0"),
    ],
)
def test_tracks_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidExample, match=message):
        texts({**SINGLE, **change}, CLIP)
    with pytest.raises(InvalidExample, match="points inside"):
        texts({**TRACKS, "tracks": [moment(0.0, (0, 2000, 1))]}, CLIP)
