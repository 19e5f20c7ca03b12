"""Multiple choice: the fixed layout, the drawn ones and how often they come."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from molmo_core.errors import InvalidExample
from molmo_training.data.formatting import SFT, FormatSettings
from molmo_training.data.formatting.choices import multiple_choice

ROW: dict[str, Any] = {
    "style": "a_okvqa_mc",
    "question": "Which animal?",
    "options": ["cat", "dog", "owl"],
    "answer_idx": 1,
}
FIXED = ("Which animal?\nOnly return the correct answer option.\nA. cat\nB. dog\nC. owl", "B. dog")
N_DRAWS = 1500


def ask(row: dict[str, Any] = ROW, settings: FormatSettings = SFT, seed: int = 0) -> Any:
    return multiple_choice(row, settings, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str]]:
    """Layouts of training, the fixed one left out."""
    return [pair for pair in (ask(seed=k) for k in range(N_DRAWS)) if pair != FIXED]


def test_outside_training_the_layout_is_fixed() -> None:
    outside = FormatSettings(is_training=False)
    assert {ask(settings=outside, seed=k) for k in range(30)} == {FIXED}
    unlabelled = {**ROW, "unlabelled_options": True}
    assert ask(unlabelled, outside) == (
        "Which animal?\nOnly return the correct answer option.\ncat\ndog\nowl",
        "dog",
    )


def test_one_in_ten_of_training_is_fixed(drawn: list[tuple[str, str]]) -> None:
    assert 0.07 < 1 - len(drawn) / N_DRAWS < 0.13


def test_drawn_layouts_show_question_and_options_and_answer_one(
    drawn: list[tuple[str, str]],
) -> None:
    for question, answer in drawn:
        assert all(part in question for part in ("Which animal?", "cat", "dog", "owl"))
        assert "{" not in question
        assert "dog" in answer or answer in {"B", "b", "2", "ii"}


def test_shares_of_the_drawn_layouts(drawn: list[tuple[str, str]]) -> None:
    label_only = sum("dog" not in answer for _, answer in drawn) / len(drawn)
    unlabelled = sum(answer == "dog" for _, answer in drawn) / len(drawn)
    inline = sum(not re.search(r"cat\n", question) for question, _ in drawn) / len(drawn)
    assert label_only == pytest.approx(0.25, abs=0.04)
    assert unlabelled == pytest.approx(0.75 * 0.2, abs=0.04)
    assert inline == pytest.approx(0.1, abs=0.03)


def test_a_label_in_the_answer_stands_before_its_option(drawn: list[tuple[str, str]]) -> None:
    labelled = [(q, a) for q, a in drawn if a.endswith("dog") and a != "dog"]
    assert len(labelled) > 100
    assert all(answer in question for question, answer in labelled)


def test_a_blank_option_is_labelled() -> None:
    row = {**ROW, "options": ["cat", "", "owl"]}
    assert all(ask(row, seed=k)[1] for k in range(300))


def test_separators_do_not_stand_in_the_options() -> None:
    row = {**ROW, "options": ["a; b", "c ||| d", "e"], "answer_idx": 2}
    questions = [ask(row, seed=k)[0] for k in range(N_DRAWS)]
    assert all(q.count(";") == 1 and q.count(" ||| ") == 1 for q in questions)


def test_many_options_get_labels_that_reach() -> None:
    row = {**ROW, "options": [f"option {k} of them" for k in range(22)], "answer_idx": 21}
    answers = {ask(row, seed=k)[1] for k in range(300)}
    assert any(answer.lower().startswith("v") for answer in answers)
    assert not any(re.search(r"\bxx|22\b", answer) for answer in answers)


def test_layouts_of_the_other_stages() -> None:
    none = FormatSettings(prompt_templates="none")
    assert ask(settings=none) == ("Which animal?\nA. cat\nB. dog\nC. owl", "B. dog")
    letters = FormatSettings(prompt_templates="uber_model", p_choice_content_in_mc=0)
    assert ask(settings=letters)[1] == "B"
    video = {**ROW, "style": "video_multiple_choice"}
    wrapped = {ask(video, FormatSettings(prompt_templates="uber_model"), k) for k in range(100)}
    assert len(wrapped) == 11
    assert all("A. cat\nB. dog\nC. owl" in q and a == "B. dog" for q, a in wrapped)


def test_several_right_options() -> None:
    row = {**ROW, "style": "video_multiple_choice_multiple_correct", "answer_idx": [0, 2]}
    question, answer = ask(row)
    assert "A. cat\nB. dog\nC. owl" in question
    assert answer == "A. cat\nC. owl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_idx": 3}, "numbers from 0 to 2"),
        ({"answer_idx": None}, "'answer_idx' .* is missing"),
        ({"answer_idx": []}, "numbers from 0 to 2"),
        ({"answer_idx": ["B"]}, "numbers from 0 to 2"),
        ({"options": []}, "1 to 26 options"),
        ({"options": "cat"}, "give a list"),
    ],
)
def test_choices_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidExample, match=message):
        ask({**ROW, **change})


def test_numbers_as_tables_hold_them() -> None:
    row = {**ROW, "options": np.array(ROW["options"]), "answer_idx": np.int64(1)}
    assert ask(row, FormatSettings(is_training=False)) == FIXED
