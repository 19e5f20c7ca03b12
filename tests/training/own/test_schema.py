"""Fields of a user's row: names and kinds are checked, the style follows from what is there."""

from __future__ import annotations

from typing import Any

import pytest

from molmo_core.errors import InvalidExample
from molmo_training.data.own.schema import KNOWN_STYLES, QUESTION_FIELDS, ROW_FIELDS, read_row

POINTS = {"label": "cats", "points": [[1, 2]]}
CHOICE = {"question": "Which?", "options": ["a", "b"], "answer_idx": 1}
TRACKS = {"label": "dog", "tracks": [{"time_s": 0, "points": [{"id": 1, "x": 1, "y": 2}]}]}


@pytest.mark.parametrize(
    ("row", "style"),
    [
        ({"image": "a.png", **POINTS}, "pointing"),
        ({"image": "a.png", **POINTS, "count": True}, "point_count"),
        ({"image": "a.png", **POINTS, "count": False}, "pointing"),
        ({"images": ["a", "b"], "label": "x", "points": [[], [[1, 2]]]}, "multi_image_pointing"),
        (
            {"images": ["a", "b"], "points_by_label": {"x": [[], []]}, "count": True},
            "multi_image_point_then_count",
        ),
        ({"video": "v.mp4", "label": "x", "points": [{"time_s": 0, "points": []}]}, "video_point"),
        ({"video": "v.mp4", "label": "x", "points": [], "count": True}, "video_point_count"),
        ({"video": "v.mp4", **TRACKS}, "video_point_track_per_frame"),
        ({"messages": ["q", "a"]}, "user_qa"),
        ({"image": "a.png", "messages": [{"role": "user", "content": "q"}]}, "user_qa"),
        ({"image": "a.png", "question": "q", "answer": "a"}, "user_qa"),
        ({"image": "a.png", "question": "q", "answers": ["a", "a"]}, "user_qa"),
        ({"image": "a.png", "text": "A cat."}, "long_caption"),
        ({"video": "v.mp4", "text": "A cat."}, "video_long_caption"),
        ({"image": "a.png", **CHOICE}, "a_okvqa_mc"),
        ({"images": ["a"], **CHOICE}, "multi_image_mc"),
        ({"video": "v.mp4", **CHOICE}, "video_multiple_choice"),
        ({"image": "a.png", "style": "refexp_pointing", **POINTS}, "refexp_pointing"),
    ],
)
def test_the_style_follows_from_the_fields(row: dict[str, Any], style: str) -> None:
    found = read_row(row)
    assert found["style"] == style
    assert style in KNOWN_STYLES
    assert "count" not in found


def test_points_of_several_images_are_listed_by_label() -> None:
    found = read_row({"images": ["a", "b"], "label": "cat", "points": [[[1, 2]], None]})
    assert found["points_by_label"] == {"cat": [[[1, 2]], []]}
    assert "points" not in found
    assert "label" not in found


def test_nulls_and_metadata_are_left_out() -> None:
    row = {"image": "a", **POINTS, "alt": None, "metadata": {"any": 1}}
    assert set(read_row(row)) == {"image", "label", "points", "style"}


def test_questions_in_a_list_have_the_style_of_their_own_fields() -> None:
    row = {
        "image": "a",
        "message_list": [POINTS, {**POINTS, "count": True}, {"messages": ["q", "a"]}],
    }
    assert [one["style"] for one in read_row(row)["message_list"]] == [
        "pointing",
        "point_count",
        "user_qa",
    ]
    turns = [POINTS, {"question": "q", "answer": "a"}]
    [one] = read_row({"image": "a", "message_list": [{"multi_turn_messages": turns}]})[
        "message_list"
    ]
    assert [turn["style"] for turn in one["multi_turn_messages"]] == ["pointing", "user_qa"]
    styled = read_row({"image": "a", "style": "vqa2", "message_list": [{"question": "q"}]})
    assert styled["message_list"][0]["style"] == "vqa2"


def test_an_object_of_lists_is_a_list_of_objects() -> None:
    found = read_row({"image": "a", "label": "x", "points": {"x": [1, 3], "y": [2, 4]}})
    assert found["points"] == [{"x": 1, "y": 2}, {"x": 3, "y": 4}]


@pytest.mark.parametrize(
    ("row", "param", "message"),
    [
        ([1], None, "a row is an object of fields, this is [1]"),
        ({"lable": "x"}, "lable", "unknown field 'lable'; near are label"),
        ({"image": "a", "images": ["b"]}, "images", "a row has image and images"),
        ({"image": 3}, "image", "field 'image' is 3; give a path, or bytes"),
        ({"image": "a", "label": 3}, "label", "field 'label' is 3; give a text"),
        ({"image": "a", "points": "1,2"}, "points", "field 'points' is '1,2'; give a list"),
        ({"image": "a", "count": 3}, "count", "field 'count' is 3; give true or false"),
        ({"image": "a", "point_scale": True}, "point_scale", "is True; give a number"),
        ({"image": "a", "points": [{"x": 1, "z": 2}]}, "z", "unknown field 'z' in points[0]"),
        (
            {"video": "v", "tracks": [{"time_s": 0, "points": [{"occuded": True}]}]},
            "occuded",
            "unknown field 'occuded' in points[0] in tracks[0]; near are occluded",
        ),
        ({"messages": [{"rôle": "user"}]}, "rôle", "in messages[0]; near are role"),
        ({"video": "v", "subtitles": [{"start": 1}]}, "start", "in subtitles[0]"),
        ({"message_list": [{"image": "a"}]}, "image", "unknown field 'image' in message_list[0]"),
        ({"message_list": ["a"]}, "message_list", "message_list[0] is 'a'; give an object"),
        ({"label": "x", "tracks": [None]}, "tracks", "tracks[0] is None; give an object"),
        ({"image": "a"}, None, "a row without a style, and none follows"),
        ({"text": "no picture"}, None, "a row without a style, and none follows"),
        ({"style": "pointing", **POINTS, "count": True}, "count", "count beside the style"),
        ({"messages": ["q", "a"], "count": True}, "count", "there is nothing to count"),
        ({"images": ["a", "b"], **POINTS}, "points", "give 2 lists"),
        ({"images": ["a"], "points": [[[1, 2]]]}, "points", "points without a label"),
        ({5: 1}, "5", "unknown field '5'"),
    ],
)
def test_what_is_wrong_is_named(row: Any, param: str | None, message: str) -> None:
    with pytest.raises(InvalidExample) as caught:
        read_row(row)
    assert message in caught.value.message
    assert caught.value.param == param


@pytest.mark.parametrize("name", sorted(set(ROW_FIELDS) - {"metadata"}))
def test_every_field_refuses_another_kind(name: str) -> None:
    with pytest.raises(InvalidExample, match=f"field '{name}' is .*; give ") as caught:
        read_row({name: object()})
    assert caught.value.param == name


def test_a_question_has_no_media() -> None:
    assert not {"image", "images", "video", "message_list"} & set(QUESTION_FIELDS)
