"""Drawn scenes as datasets: every style family, the same row for ever, sizes as told."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.scenes import COLOUR_JITTER, COLOURS
from molmo_training.data.example import Tokenized
from molmo_training.data.formatting import PRETRAIN, SFT, Formatter
from molmo_training.data.packing import Size
from molmo_training.data.rows import FormattedRows, PendingRow
from molmo_training.data.sampling import MediaSettings
from molmo_training.data.tokenize import Tokenizing
from molmo_training.datasets import all_datasets, data_folder, open_dataset
from molmo_training.recipes.tiny import IMAGES, VIDEOS
from molmo_training.vocabulary import load_vocabulary

DRAWN = [found.name for found in all_datasets() if "drawn" in found.groups]
TOKENIZING = Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)


def rows_of(name: str, format_settings: object = SFT, split: str = "train") -> FormattedRows:
    return FormattedRows(
        table=open_dataset(name, data_folder(), split),
        formatter=Formatter(settings=format_settings),
        tokenizing=TOKENIZING,
        media=MediaSettings(max_frames=8),
    )


def example(rows: FormattedRows, index: int, seed: int = 0) -> PendingRow:
    made = rows.make(index, np.random.default_rng(seed))
    assert isinstance(made, PendingRow)
    return made


def text_of(rows: FormattedRows, n: int) -> list[str]:
    """Questions and answers of the first rows."""
    examples = [rows.example(k, np.random.default_rng(k)) for k in range(n)]
    return [turn.text for one in examples for branch in one.branches for turn in branch.turns]


@pytest.mark.parametrize("name", DRAWN)
@settings(derandomize=True, max_examples=8, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 10**6), is_pretrain=st.booleans())
def test_a_row_is_as_large_as_told_and_always_the_same(
    name: str, index: int, seed: int, is_pretrain: bool
) -> None:
    rows = rows_of(name, PRETRAIN if is_pretrain else SFT)
    pending = example(rows, index, seed)
    row, again = pending.row(), example(rows, index, seed).row()
    assert Size(len(row.input_ids), len(row.crops)) == pending.size
    for field in fields(Tokenized):
        assert np.array_equal(getattr(row, field.name), getattr(again, field.name)), field.name


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("drawn_points", [r"^<points coords=\"1 1 \d{3} \d{3}", "^Counting the "]),
        ("drawn_count", [r"^\d$", r"^There are \d <points"]),
        ("drawn_multi_points", [r"coords=\"1 1 .*;2 \d", "image_2", "in all images.$"]),
        ("drawn_captions", [r"^An? \w+ \w+ (at|in|on) the", "^Describe this image br", "I see"]),
        ("drawn_questions", ["^vqa2: ", r"\bA\b", "^What colour"]),
        ("drawn_image_questions", ["in image 2", "image 1"]),
        ("drawn_chat", ["^<points", "^What (colour|shape)"]),
        ("drawn_text", [r"^What is \d+ \+ \d+\?$", r"corners has a star"]),
        ("drawn_tracks", [r"^<tracks coords=\"0.0 1 .*;0\.5 1", "^Track the .* in the video.$"]),
        ("drawn_ground", [r"^<tracks coords=\"[^;]*;[^;]*\">"]),
        ("drawn_single_point_tracks", ["single_point_track_per_frame: .*<points", "^<tracks"]),
        ("drawn_video_points", [r"^<points coords=\"0.0 1", r"^Counting the .* total of", r"^\d$"]),
        ("drawn_video_questions", ["^video_short_answer: ", "in the end"]),
        ("drawn_video_captions", ["^The .* goes from", "^A video of"]),
        ("drawn_speech", ["Which colour is spoken of"]),
    ],
)  # fmt: skip
def test_a_set_asks_and_answers_in_its_styles(name: str, patterns: list[str]) -> None:
    texts = text_of(rows_of(name), 40)
    for pattern in patterns:
        assert any(re.search(pattern, text) for text in texts), pattern


def test_splits_share_nothing() -> None:
    train, validation = (
        open_dataset("drawn_text", data_folder(), s) for s in ("train", "validation")
    )
    assert [train.row(k) for k in range(20)] != [validation.row(k) for k in range(20)]
    assert len(validation) == 2_000


def test_marks_tell_where_objects_are_and_what_answers_are_about() -> None:
    rows = rows_of("drawn_points")
    row = next(
        row for k in range(20) if (row := example(rows, k).row()).about.any() and row.shows.any()
    )
    named = set(np.unique(row.about[row.about > 0]).tolist())
    shown = int(np.bitwise_or.reduce(row.shows))
    assert all(bits & shown == bits for bits in named)
    moving = example(rows_of("drawn_tracks"), 0).row()
    assert (moving.patch_targets[..., 0].sum(axis=1) > 0).all()


def test_tables_go_to_other_processes() -> None:
    table = open_dataset("drawn_points", data_folder())
    there = pickle.loads(pickle.dumps(table))
    assert there.row(7)["message_list"] == table.row(7)["message_list"]


def is_of_colour(label: str, pixel: np.ndarray) -> bool:
    """Whether a pixel has the colour that a label names; true for labels that name none."""
    named = [rgb for name, rgb in COLOURS.items() if name in label.split()]
    return not named or bool(np.abs(pixel.astype(int) - named[0]).max() <= COLOUR_JITTER + 2)


def test_points_lie_on_what_they_name() -> None:
    table = open_dataset("drawn_points", data_folder())
    n_points = 0
    for index in range(12):
        row = table.row(index)
        pixels = np.asarray(row["image"])
        for part in row["message_list"]:
            for x, y in part["points"]:
                assert is_of_colour(part["label"], pixels[int(y), int(x)])
                n_points += 1
    assert n_points > 30


def test_tracks_lie_on_what_they_name() -> None:
    table = open_dataset("drawn_tracks", data_folder())
    n_points = 0
    for index in range(6):
        row = table.row(index)
        for part in row["message_list"]:
            times_s = [moment["time_s"] for moment in part["tracks"]]
            frames = row["video"].frames_at(times_s, row["video"].size_hw)
            for frame, moment in zip(frames, part["tracks"], strict=True):
                for point in moment["points"]:
                    pixel = frame[int(point["y"]), int(point["x"])]
                    assert is_of_colour(part["label"], pixel)
                    n_points += 1
    assert n_points > 30
