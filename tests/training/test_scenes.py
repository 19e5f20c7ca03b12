"""Training answers against the scenes that they were made of."""

from __future__ import annotations

import numpy as np
import pytest

from molmo_core.clips import sample_clip
from molmo_core.points import parse_grounding
from molmo_core.videos import sample_times
from molmo_training.data.example import Example
from molmo_training.data.scenes import (
    clip_info,
    image_example,
    multi_image_example,
    spoken,
    video_example,
)
from molmo_training.recipes.tiny import VIDEOS

SEEDS = range(40)


def answers(example: Example) -> list[tuple[str, str]]:
    return [(b.turns[0].text, b.turns[1].text) for b in example.branches]


@pytest.mark.parametrize("make", [image_example, multi_image_example])
def test_points_of_answers_are_centres_of_objects(make) -> None:
    n_points = 0
    for seed in SEEDS:
        example = make(np.random.default_rng(seed))
        for _, answer in answers(example):
            found = parse_grounding(answer, media="image", n_media=len(example.images))
            for point in found.points:
                centres = [(o.x, o.y) for o in example.objects[point.media_index]]
                nearest = min(max(abs(x - point.x), abs(y - point.y)) for x, y in centres)
                assert nearest <= 0.0011  # a coordinate is a whole thousandth
                n_points += 1
    assert n_points > 50


def test_the_same_generator_makes_the_same_example() -> None:
    one, two = (image_example(np.random.default_rng(5)) for _ in range(2))
    assert answers(one) == answers(two)
    assert np.array_equal(one.images[0], two.images[0])


def test_tracks_follow_the_objects_of_each_sampled_frame() -> None:
    n_points = 0
    for seed in SEEDS:
        example = video_example(np.random.default_rng(seed), VIDEOS)
        _, answer = answers(example)[0]
        for point in parse_grounding(answer, media="video", n_media=1).observations:
            times = np.array(example.frame_times_s)
            frame = int(np.abs(times - point.time_s).argmin())
            centres = [(o.x, o.y) for o in example.objects[frame]]
            assert min(max(abs(x - point.x), abs(y - point.y)) for x, y in centres) <= 0.0011
            n_points += 1
    assert n_points > 100


def test_frame_times_are_those_of_the_server() -> None:
    clip = sample_clip(np.random.default_rng(3))
    example = video_example(np.random.default_rng(3), VIDEOS)
    assert list(example.frame_times_s) == sample_times(clip_info(clip).duration_s, VIDEOS)


def test_labels_lose_their_article() -> None:
    assert [spoken("the red circle"), spoken("stars")] == ["red circle", "stars"]
