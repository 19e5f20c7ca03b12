"""What is asked and answered by style: the samples of appendix C, templates, answers, prefixes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from molmo_core.errors import InvalidExample
from molmo_training.data.formatting import (
    PRETRAIN,
    SFT,
    FormatSettings,
    Formatter,
    LossWeight,
)
from molmo_training.data.formatting.counting_guard import guard_prefixes, is_counting_question
from molmo_training.data.formatting.questions import clock_text, seconds_text
from molmo_training.data.formatting.style_prefix import style_prefix, trained_style
from molmo_training.data.formatting.templates import template_groups

CAPTION = "A red bus on a wet street."
PART = {"style": "video_clip_caption_start_end", "text": "x"}
BARE = FormatSettings(prompt_templates="none", system_prompt="style")


def texts(row: dict[str, Any], settings: FormatSettings = SFT, seed: int = 0) -> list[str]:
    (branch,) = Formatter(settings=settings)(row, np.random.default_rng(seed)).branches
    return [turn.text for turn in branch.turns]


def drawn(row: dict[str, Any], settings: FormatSettings = SFT, n: int = 300) -> Counter[str]:
    return Counter(texts(row, settings, seed)[0] for seed in range(n))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"style": "vqa2", "question": "What color is the bus?", "answers": ["red"]},
            ["vqa2: What color is the bus?", "red"],
        ),
        (
            {"style": "chart_qa", "question": "Which year?", "answer": "1999"},
            ["chart_qa: Which year?", "1999"],
        ),
        ({"style": "video_merged_caption", "text": CAPTION}, ["video_merged_caption:", CAPTION]),
        (
            {
                "style": "cosyn_chart_exp",
                "question": "Which bar is highest?",
                "explanation": "B reaches 9.",
                "answer": "B",
            },
            [
                "cosyn_chart_exp: Which bar is highest? "
                "Provide reasoning steps and then give the short answer.",
                "B reaches 9. Answer: B",
            ],
        ),
        (
            {"style": "user_qa", "messages": ["Hi", "Hello.", "How many cats?", "Two."]},
            ["Hi", "Hello.", "How many cats?", "Two."],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello."},
                ]
            },
            ["Hi", "Hello."],
        ),
        ({"style": "user_qa", "prompt": "Say it.", "text": CAPTION}, ["Say it.", CAPTION]),
        (
            {
                "style": "vqa2",
                "multi_turn_messages": [
                    {"question": "Colour?", "answers": "red"},
                    {"style": "okvqa", "question": "Where?", "answer": "street"},
                ],
            },
            ["vqa2: Colour?", "red", "Where?", "street"],
        ),
    ],
)
def test_fixed_questions(row: dict[str, Any], expected: list[str]) -> None:
    assert texts(row) == expected


@pytest.mark.parametrize("style", ["long_caption", "video_short_caption", "video_transcript"])
def test_captions_are_asked_for_in_every_sentence_of_their_group(style: str) -> None:
    assert set(drawn({"style": style, "text": CAPTION})) == set(template_groups()[style])


def test_other_wrapped_questions() -> None:
    short = {"style": "video_short_answer", "question": "Who?", "answer": "him"}
    wanted = {
        f"video_short_answer: {t.format(question='Who?')}"
        for t in template_groups()["video_short_answer"]
    }
    assert "video_short_answer: Who? Answer with a few words" in wanted
    assert set(drawn(short)) == wanted
    about = {"style": "video_object_caption", "object": "the dog", "text": CAPTION}
    assert all("the dog" in question for question in drawn(about, n=30))


# Moments


def test_moments_are_seconds_or_clock_times_in_equal_parts() -> None:
    row = {"style": "video_clip_caption_start_end", "start_s": 3, "end_s": 64.96, "text": CAPTION}
    questions = drawn(row, n=400)
    clock = sum(n for q, n in questions.items() if "00:00:03.0" in q and "00:01:05.0" in q)
    seconds = sum(n for q, n in questions.items() if "3.0 seconds" in q and "65.0 seconds" in q)
    assert clock + seconds == 400
    assert 160 < clock < 240
    assert "seconds" in texts({**row, "style": f"{row['style']}_in_seconds"})[0]
    only = FormatSettings(timestamp_mode="clock")
    assert not any("seconds" in question for question in drawn(row, only, n=50))


def test_moments_without_templates() -> None:
    part = {"style": "video_clip_caption_start_end", "start_s": 3, "end_s": 64.96, "text": CAPTION}
    moment = {"style": "video_frame_caption_timestamp", "time_s": 1.5, "text": CAPTION}
    settings = FormatSettings(prompt_templates="none", system_prompt="none")
    assert texts(part, settings) == ["3.00-64.96", CAPTION]
    assert texts(moment, settings) == ["1.50", CAPTION]


@pytest.mark.parametrize(
    ("time_s", "seconds", "clock"),
    [(0, "0", "00:00:00.0"), (59.96, "60.0", "00:01:00.0"), (3725.25, "3725.2", "01:02:05.2")],
)
def test_written_times(time_s: float, seconds: str, clock: str) -> None:
    assert (seconds_text(time_s), clock_text(time_s)) == (seconds, clock)


# Answers


def test_the_most_frequent_answer_is_taken_ties_are_drawn() -> None:
    row = {"style": "vqa2", "question": "?", "answers": ["red", "blue", "red", "no"]}
    assert texts(row)[1] == "red"
    tied = {**row, "answers": ["red", "blue"]}
    assert {texts(tied, seed=k)[1] for k in range(20)} == {"red", "blue"}
    assert {texts(tied, FormatSettings(is_training=False), k)[1] for k in range(20)} == {"red"}


def test_points_stand_where_the_answer_has_its_marks() -> None:
    row = {
        "style": "user_qa",
        "question": "Which?",
        "answer": "The <|POINT|> beside <|POINT|>.",
        "answer_annotations": [
            {"label": "Cup", "points": [[50, 20]], "point_scale": 100},
            {"label": "pen", "points": [{"x": 1, "y": 2}], "point_scale": 100},
        ],
    }
    assert texts(row)[1] == (
        'The <points coords="1 1 500 200">cup</points> beside '
        '<points coords="1 1 010 020">pen</points>.'
    )
    with pytest.raises(InvalidExample, match="one for each"):
        texts({**row, "answer": "The <|POINT|>."})


# Prefixes


def prefixes(style: str, mode: str, n_answer_chars: int = 150, **changes: Any) -> Counter[str]:
    options = {"system_prompt": mode, "prompt_templates": "none", **changes}
    settings = FormatSettings(**options)
    return Counter(
        style_prefix(
            style,
            n_answer_chars=n_answer_chars,
            settings=settings,
            rng=np.random.default_rng(seed),
        )
        for seed in range(400)
    )


@pytest.mark.parametrize(
    ("style", "mode", "expected"),
    [
        ("pointing", "style", "pointing:"),
        ("pointing", "none", ""),
        ("pointing", "demo_or_style_v2", ""),
        ("video_multiple_choice", "demo_or_style_v2", ""),
        ("ai2_diagram", "demo_or_style_v2", ""),
        ("video_point_ground_start_end", "demo_or_style_v2", "video_point_ground_start_end:"),
        ("vqa2", "demo_or_style", "vqa2:"),
        ("android_control", "demo_or_style", ""),
        ("point_count", "style_and_length_v2", "point_count:"),
    ],
)
def test_fixed_prefixes(style: str, mode: str, expected: str) -> None:
    assert set(prefixes(style, mode)) == {expected}


def test_one_in_ten_of_the_demo_styles_is_named() -> None:
    found = prefixes("user_qa", "demo_or_style")
    assert set(found) == {"", "user_qa:"}
    assert 20 <= found["user_qa:"] <= 60


@pytest.mark.parametrize(
    ("mode", "unsaid"),
    [
        ("style_and_length", "long_caption :"),
        ("style_and_length_v2", "long_caption:"),
        ("style_and_length_v3", "long_caption:"),
    ],
)
def test_the_length_of_the_answer_is_told_about(mode: str, unsaid: str) -> None:
    found = prefixes("long_caption", mode, n_answer_chars=1500)
    assert 20 <= found.pop(unsaid) <= 60
    told = [int(p.removeprefix("long_caption ").rstrip(":")) for p in found.elements()]
    centre = 60 if mode.endswith("v3") else 100
    assert np.mean(told) == pytest.approx(centre, abs=1)
    assert 1 < np.std(told) < 4
    held_out = prefixes("long_caption", mode, n_answer_chars=1500, is_training=False)
    assert held_out == prefixes("long_caption", mode, n_answer_chars=1500)
    pointing = prefixes("pointing", mode)
    assert (set(pointing) == {"pointing:"}) != mode.endswith("v3")


def test_pretraining_asks_with_style_and_length() -> None:
    found = drawn({"style": "long_caption", "text": "x" * 1245}, PRETRAIN)
    assert "long_caption 83:" in found
    nlp = texts({"style": "text_sft", "messages": ["Why?", "y" * 600]}, PRETRAIN, seed=1)
    assert nlp[0].startswith("text_sft ")
    assert nlp[0].endswith(": Why?")


@pytest.mark.parametrize(
    ("style", "in_training", "outside"),
    [
        ("eval_short_answer", "eval_short_answer", "vqa2"),
        ("eval_multiple_choice", "eval_multiple_choice", "a_okvqa_mc"),
        ("video_eval_multiple_choice_w_subtitle",) * 2 + ("video_multiple_choice_w_subtitle",),
        ("eval_multi_image_mc", "eval_multi_image_mc", "multi_image_mc"),
        ("video_short_answer_count_without_pointing",) + ("video_short_answer",) * 2,
    ],
)
def test_names_of_styles(style: str, in_training: str, outside: str) -> None:
    assert trained_style(style, SFT) == in_training
    assert trained_style(style, FormatSettings(is_training=False)) == outside
    kept = FormatSettings(keep_count_without_pointing=True)
    assert trained_style(style, kept) == style


def test_a_mode_that_would_name_the_demo_is_refused() -> None:
    with pytest.raises(ValueError, match="use 'demo_or_style_v2'"):
        FormatSettings(system_prompt="demo_or_style")


# Counting questions


@pytest.mark.parametrize(
    ("question", "counts"),
    [
        ("How many people are there?", True),
        ("how many red cups do you see", True),
        ("Count all birds.", True),
        ("Please tally every car", True),
        ("There are ____ apples on the table.", True),
        ("There are a total of ___ dogs.", True),
        ("What is the total number of chairs?", True),
        ("How many minutes are left?", False),
        ("Approximately how many people are there?", False),
        ("What colour is the bus?", False),
        ("Does the counter count?", False),
    ],
)
def test_counting_questions(question: str, counts: bool) -> None:
    assert is_counting_question(question) == counts


def test_counting_questions_are_guarded_in_every_turn() -> None:
    row = {
        "style": "user_qa",
        "guard_counting": True,
        "messages": ["Hi", "Hello.", "How many cats?", "Two."],
    }
    found = {texts(row, seed=k)[2] for k in range(400)}
    assert found == {f"{prefix}How many cats?" for prefix in guard_prefixes()}
    assert texts(row)[0] == "Hi"
    assert texts({**row, "guard_counting": None})[2] == "How many cats?"


# What cannot be used


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "field 'style' of a row of style None is missing"),
        ({"style": 3, "text": "x"}, "field 'style' of a row of style 3 is 3"),
        ({"style": "vqa2", "question": "?"}, "'answer' .* is missing; give answer, answers"),
        ({"style": "vqa2", "question": 7, "answer": "x"}, "'question' .* is 7; give a text"),
        ({"style": "vqa2", "question": "?", "answers": []}, "at least one answer"),
        ({"style": "user_qa", "messages": ["only"]}, "an answer to each question"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "in turn, beginning with the user"),
        ({"message_list": []}, "at least one row"),
        ({"message_list": ["x"]}, "a list of objects"),
        ({"style": "vqa2", "question": "<im_patch>", "answer": "x"}, "control token '<im_patch>'"),
        ({"style": "vqa2", "answer": "x", "weight": -1}, "a weight above 0"),
        (
            {"style": "vqa2", "answer": "x", "weight": True},
            "'weight' .* is True; give a finite number",
        ),
        ({"style": "vqa2", "answer": "x", "weight": {"w": 1}}, "root_subsegments, root_length"),
        ({"style": "video_frame_caption_timestamp", "text": "x"}, "'time_s' .* is missing"),
        ({**PART, "start_s": 5, "end_s": 1}, "0 ≤ start_s < end_s"),
        ({**PART, "start_s": 0, "end_s": float("inf")}, "'end_s' .* is inf; give a finite"),
        ({"style": "video_frame_caption_timestamp", "time_s": -1, "text": "x"}, "seconds from 0"),
        ({"style": "vqa2", "question": "?", "answers": [None]}, "a list of texts"),
        ({"style": "", "text": "x"}, "the name of a style"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidExample, match=message):
        texts(row)


def test_weights_of_a_row_and_of_its_branches() -> None:
    row = {
        "style": "vqa2",
        "weight": {"weight": 0.2, "root_length": False},
        "message_list": [
            {"question": "a?", "answer": "b"},
            {"question": "c?", "answer": "d", "weight": {"weight": 0.5, "root_length": True}},
        ],
    }
    of_mixture = LossWeight(factor=0.5, root_subsegments=False, root_length=False)
    for whole, factor in ((LossWeight(), 1.0), (of_mixture, 0.5)):
        formatter = Formatter(settings=SFT, weight=whole)
        branches = formatter(row, np.random.default_rng(0)).branches
        found = {b.turns[0].text: (b.weight, b.root_subsegments, b.root_length) for b in branches}
        assert found == {
            "vqa2: a?": (0.2 * factor, whole.root_subsegments, False),
            "vqa2: c?": (0.1 * factor, whole.root_subsegments, True),
        }


def test_a_caption_and_its_transcript_are_two_branches() -> None:
    row = {
        "message_list": [
            {"style": "long_caption", "text": CAPTION},
            {"style": "transcript", "text": "so here is a bus"},
        ]
    }
    branches = Formatter(settings=BARE)(row, np.random.default_rng(0)).branches
    found = {b.turns[0].text: b.turns[1].text for b in branches}
    assert found == {"long_caption:": CAPTION, "transcript:": "so here is a bus"}
