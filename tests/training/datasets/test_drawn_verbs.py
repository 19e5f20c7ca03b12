"""Drawn scenes in the server's words, as rows: nothing is lost of the examples they are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from molmo_training.data.example import Branch, Example
from molmo_training.data.formatting import SFT, Formatter
from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import FormattedRows
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.datasets.drawn_verbs import corners_example, draw_clip, draw_pictures
from molmo_training.recipes.tiny import VIDEOS


class OneRow:
    def __init__(self, row: Row) -> None:
        self._row = row

    def __len__(self) -> int:
        return 1

    def row(self, index: int) -> Row:
        return self._row


def formatted(row: Row, tokenizing: Tokenizing) -> Example:
    rows = FormattedRows(
        table=OneRow(row), formatter=Formatter(settings=SFT), tokenizing=tokenizing
    )
    return rows.example(0, np.random.default_rng(9))


def by_text(branches: tuple[Branch, ...]) -> list[Branch]:
    return sorted(branches, key=lambda branch: str(branch.turns))


@pytest.mark.parametrize("make", [image_example, multi_image_example, corners_example])
def test_pictures_and_questions_are_those_of_the_example(
    make: Callable[[np.random.Generator], Example], tokenizing: Tokenizing
) -> None:
    for seed in range(5):
        made = make(np.random.default_rng(seed))
        found = formatted(draw_pictures(np.random.default_rng(seed), make=make), tokenizing)
        assert by_text(found.branches) == by_text(made.branches)
        assert list(found.objects) == list(made.objects)
        assert len(found.images) == len(made.images)
        for one, other in zip(found.images, made.images, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_clip_is_sampled_as_its_answers_are_told(tokenizing: Tokenizing) -> None:
    for seed in range(5):
        made = video_example(np.random.default_rng(seed), VIDEOS)
        found = formatted(draw_clip(np.random.default_rng(seed)), tokenizing)
        assert list(found.frame_times_s) == list(made.frame_times_s)
        assert by_text(found.branches) == by_text(made.branches)
        assert list(found.objects) == list(made.objects)
        assert np.asarray(found.frames).shape[0] == len(made.frames)


def test_every_kind_in_the_picture_is_asked_about_once() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        example = corners_example(rng)
        asked = {branch.turns[0].text: branch.turns[1].text for branch in example.branches}
        assert len(asked) == len(example.branches) >= 1
        for question, answer in asked.items():
            shape = question.removesuffix("?").split()[-1]
            assert answer == str({"circle": 0, "triangle": 3, "square": 4, "star": 10}[shape])
