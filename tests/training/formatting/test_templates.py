"""The template files: as many sentences a group as the specification lists, with its slots."""

from __future__ import annotations

import numpy as np
import pytest

from molmo_training.data.formatting.counting_guard import guard_prefixes
from molmo_training.data.formatting.templates import (
    fill_template,
    load_table,
    slots_of,
    template_groups,
)

# Specification of training, section 2.5: name → (number of templates, slots).
GROUPS = {
    "short_answer": (15, "question"),
    "video_short_answer": (15, "question"),
    "short_caption": (11, ""),
    "long_caption": (23, ""),
    "video_short_caption": (11, ""),
    "video_long_caption": (23, ""),
    "video_motion_caption": (10, ""),
    "video_object_caption": (10, "object"),
    "video_clip_caption_start_end": (21, "start end"),
    "video_clip_caption_start_end_in_seconds": (21, "start end"),
    "video_frame_caption_timestamp": (13, "time"),
    "video_frame_caption_timestamp_in_seconds": (13, "time"),
    "video_clip_transcript_start_end": (5, "start end"),
    "video_clip_transcript_start_end_in_seconds": (5, "start end"),
    "long_caption_no_pointing": (5, ""),
    "transcript": (5, ""),
    "video_transcript": (5, ""),
    "refexp_pointing": (14, "label"),
    "plain": (1, "question"),
    "multiple_choice": (11, "question options"),
    "video_multiple_choice_multiple_correct": (5, "question options"),
    "pointing": (43, "label"),
    "point_count": (60, "label"),
    "count_then_point": (6, "label"),
    "only_count": (6, "label"),
    "video_point": (43, "label"),
    "video_point_count": (60, "label"),
    "video_count_point": (6, "label"),
    "video_count": (6, "label"),
    "chain_of_thought": (1, "question"),
    "multi_image_pointing": (11, "label images"),
    "multi_image_point_then_count": (14, "label images"),
    "multi_image_counting": (9, "label images"),
    "multi_image_count_then_point": (9, "label images"),
    "video_point_track_per_frame": (10, "label fps"),
    "video_point_track_per_frame_default_fps": (8, "label"),
    "video_point_ground_start_end": (7, "label"),
    "video_single_point_track_per_frame": (12, "input_points fps"),
    # Ours: the specification names the style, but has no sentences for it.
    "video_single_point_track_start_end": (4, "input_points"),
}


def test_groups_are_those_of_the_specification() -> None:
    assert set(template_groups()) == set(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_number_and_slots(name: str) -> None:
    templates = template_groups()[name]
    n_templates, slots = GROUPS[name]
    assert (len(templates), len(set(templates))) == (n_templates, n_templates)
    assert {slots_of(t) for t in templates} == {frozenset(slots.split())}


@pytest.mark.parametrize("name", [name for name in GROUPS if name.startswith("video_")])
def test_a_video_is_not_called_a_picture(name: str) -> None:
    words = " ".join(template_groups()[name]).lower().split()
    assert {"image", "images", "picture", "photo"}.isdisjoint(w.strip(".,:?") for w in words)


def test_moments_in_seconds_say_so() -> None:
    sentence = fill_template(
        "video_clip_caption_start_end_in_seconds", np.random.default_rng(0), start="1.0", end="2.5"
    )
    assert "1.0 seconds" in sentence
    assert "2.5 seconds" in sentence


def test_every_sentence_is_drawn_and_labels_may_hold_braces() -> None:
    rng = np.random.default_rng(0)
    drawn = {fill_template("only_count", rng, label="{x}") for _ in range(200)}
    assert drawn == {t.replace("{label}", "{x}") for t in template_groups()["only_count"]}


def test_parts_of_multiple_choice_are_as_many_as_specified() -> None:
    parts = load_table("choices")
    instructions, layouts = parts["instructions"], parts["layouts"]
    assert {name: len(found) for name, found in instructions.items()} == {
        "label_only": 16,
        "option": 14,
        "labelled_option": 2,
    }
    assert {name: len(set(found)) for name, found in layouts.items()} == {
        "instructed": 15,
        "label_only": 9,
        "option": 19,
    }
    assert parts["markers"] == ["%s. ", "%s) ", "%s: ", "(%s) "]
    assert len(set(guard_prefixes())) == 32
