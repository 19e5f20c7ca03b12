"""What single public sets do beside reading rows: portions, labels, weights, choices, paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from molmo_core.errors import DataError, InvalidExample
from molmo_training.data.formatting import Formatter
from molmo_training.data.rows import resolved
from molmo_training.datasets import open_dataset
from molmo_training.datasets.pixmo import in_portions
from molmo_training.datasets.video_points import asked_of_clip
from molmo_training.datasets.videos import parse_choice

from . import layouts
from .test_public_sets import CASES, PLAIN, charts, in_ai2


def test_points_are_counted_and_again_pointed_at_in_portions(tmp_path: Path) -> None:
    next(case for case in CASES if case.name == "pixmo_points_train").write(tmp_path)
    table = open_dataset("pixmo_points_train", tmp_path)
    rows = [table.row(index) for index in range(4)]
    assert [row["style"] for row in rows] == ["point_count"] * 2 + ["pointing"] * 2
    # The label of 61 points is left out, the two of 61 together are two examples.
    labels = [[part["label"] for part in row["message_list"]] for row in rows]
    assert labels == [["Cat"], ["grass"]] * 2
    assert rows[0]["image"] == tmp_path / "torch_datasets" / "pixmo_images" / "a1"


@pytest.mark.parametrize(
    ("counts", "portions"),
    [
        ([1, 60, 61, 2], [[0], [1], [3]]),
        ([30, 30, 1], [[0, 1], [2]]),
        ([0, 0], [[0, 1]]),
        ([], []),
        ([70], []),
    ],
)
def test_labels_go_together_up_to_a_number_of_points(
    counts: list[int], portions: list[list[int]]
) -> None:
    assert in_portions(counts, 60) == portions


def test_charts_by_people_and_by_machine_weigh_the_same_in_all(tmp_path: Path) -> None:
    charts(tmp_path)
    weighted = open_dataset("chart_qa_weighted", tmp_path)
    by_people, by_machine = (weighted.row(index)["weight"] for index in range(2))
    assert by_people == pytest.approx(2 * 20901 / 28299)
    assert 7398 * by_people == pytest.approx(20901 * by_machine)
    assert "weight" not in open_dataset("chart_qa", tmp_path).row(0)


def test_conversations_about_clips_are_drawn_sometimes(tmp_path: Path) -> None:
    label = {"label": "dog", "two_fps_timestamps": [0.5], "points": [[{"x": 1.0, "y": 1.0}]]}
    row = asked_of_clip([label, {**label, "label": "cat"}], 0.0)
    drawn = [resolved(row, np.random.default_rng(seed)) for seed in range(100)]
    in_turn = [r for r in drawn if "multi_turn_messages" in r["message_list"][0]]
    assert 10 <= len(in_turn) <= 30
    assert [len(r["message_list"]) for r in drawn if r not in in_turn] == [2] * (100 - len(in_turn))


@pytest.mark.parametrize(
    ("text", "answer", "question", "answer_idx"),
    [
        ("<image>\nWho?\n(A) he\n(B) she\nAnswer with the letter.", "(B) she", "Who?", 1),
        ("Who?\nA. he\nB. she", "A", "Who?", 0),
        ("Two\nlines?\nA) he\nB) she", "B. she", "Two\nlines?", 1),
    ],
)
def test_lettered_lines_are_options(text: str, answer: str, question: str, answer_idx: int) -> None:
    choice = parse_choice(text, answer)
    assert choice["options"] == ["he", "she"]
    assert (choice["question"], choice["answer_idx"]) == (question, answer_idx)


@pytest.mark.parametrize("answer", ["C.", "she", ""])
def test_an_answer_that_is_no_option_is_refused(answer: str) -> None:
    with pytest.raises(InvalidExample, match="the letter of one of them"):
        parse_choice("Who?\nA. he\nB. she", answer)


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    write = in_ai2("allenai/molmo2-text-vqa", image="text_vqa/a.jpg", question="?", answers=["a"])
    write(tmp_path)
    layouts.hub(
        tmp_path,
        "allenai/molmo2-text-vqa",
        [{"image": "../../secret.png", "question": "?", "answers": ["a"]}],
        at="train/train",
    )
    with pytest.raises(DataError, match="not below"):
        open_dataset("text_vqa", tmp_path).row(0)


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("a_okvqa_da", ["a_okvqa_da: What?", "cat"]),
        ("a_okvqa_mc", ["What?\nA. cat\nB. dog", "A. cat"]),
    ],
)
def test_a_table_of_two_kinds_of_answers_is_asked_for_one(
    name: str, branch: list[str], tmp_path: Path
) -> None:
    write = in_ai2(
        "allenai/molmo2-a-ok-vqa",
        image="images/coco/train2017/a.jpg",
        question="What?",
        answers=["cat"],
        options=["cat", "dog"],
        answer_idx=0,
    )
    write(tmp_path)
    row = open_dataset(name, tmp_path).row(0)
    example = Formatter(settings=PLAIN)(row, np.random.default_rng(0))
    assert [turn.text for turn in example.branches[0].turns] == branch
