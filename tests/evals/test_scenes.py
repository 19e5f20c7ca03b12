"""The drawn-scenes task: which samples it makes and what answers to them are worth."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from fractions import Fraction
from functools import partial
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image

from molmo_core import api
from molmo_core.clips import FRAME_RATES, Clip
from molmo_core.errors import InvalidRequest
from molmo_core.scenes import describe, draw_scene, parse_query, sample_scene
from molmo_evals.task import Sample, find_task
from molmo_evals.tasks import scenes_scoring as scoring
from molmo_evals.tasks.scenes import FIRST_ENTROPY, GROUPS
from molmo_training.datasets import data_folder, open_dataset
from molmo_training.datasets.drawn_tables import N_ROWS
from molmo_training.recipes import tiny

SHARED: dict[str, Any] = {
    "request_id": "r",
    "checkpoint": "c",
    "text": "",
    "finish_reason": "stop",
    "media": [],
    "frames": [],
    "warnings": [],
    "usage": api.Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
}


def samples_of(group: str, n: int, seed: int = 5) -> list[Sample]:
    return [one for one in find_task("scenes").samples(seed, n) if one.group == group]


def drawn(sample: Sample) -> Any:
    return cast("partial[list[bytes]]", sample.media).args[0]


def point_answer(
    places: list[tuple[int, float, float]],
    *,
    status: api.Status = "found",
    time_s: float | None = None,
) -> api.PointAnswer:
    """`places` are (media index, x, y)."""
    points = [
        api.Point(
            x=x,
            y=y,
            pixel=api.Pixel(x=0, y=0),
            id=number,
            label=None,
            media_index=index,
            t=time_s,
            frame=None if time_s is None else 0,
            span=(0, 0),
        )
        for number, (index, x, y) in enumerate(places, start=1)
    ]
    found = status == "found"
    return api.PointAnswer(points=points, count=len(points), found=found, status=status, **SHARED)


def true_places(sample: Sample) -> list[tuple[int, float, float]]:
    query = parse_query(sample.text)
    return [
        (index, item.x_px / scene.width_px, item.y_px / scene.height_px)
        for index, scene in enumerate(drawn(sample))
        for item in scene.objects
        if query.matches(item)
    ]


def test_targets_are_those_of_the_project() -> None:
    assert {group.name: group.target for group in GROUPS if group.target is not None} == {
        "image points": 0.90,
        "multi-image points": 0.80,
        "counting": 0.80,
        "none": 0.90,
        "tracks": 0.75,
    }


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    first, again = samples_of("image points", 3), samples_of("image points", 3)
    assert [one.media() for one in first] == [one.media() for one in again]
    assert [one.text for one in first] == [one.text for one in again]
    assert [drawn(one) for one in samples_of("image points", 5)[:3]] == [drawn(o) for o in first]
    assert [drawn(one) for one in samples_of("image points", 3, seed=6)] != [
        drawn(one) for one in first
    ]


def test_every_group_has_as_many_samples_as_asked() -> None:
    keys = [one.key for one in find_task("scenes").samples(1, 4)]
    assert len(set(keys)) == len(keys) == 4 * len(GROUPS)
    assert Counter(key.split("/")[0] for key in keys) == {group.name: 4 for group in GROUPS}


def test_no_sample_was_trained_on() -> None:
    assert tiny.SEED < FIRST_ENTROPY  # of the tower's pictures
    # Rows are drawn from (name, split, number), samples from (entropy, group, number).
    assert all(zlib.crc32(split.encode()) > len(GROUPS) for split in N_ROWS)
    fresh = [drawn(one)[0] for one in samples_of("counting", 20, seed=0)]
    table = open_dataset("verbs_image", data_folder())
    trained = [np.asarray(table.row(k)["images"][0]) for k in range(20)]
    assert not any(np.array_equal(draw_scene(scene), one) for scene in fresh for one in trained)


def test_a_seed_outside_the_range_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the seed is -1; give one from 0"):
        next(find_task("scenes").samples(-1, 1))


def test_media_are_what_was_drawn() -> None:
    sample = samples_of("multi-image points", 1)[0]
    files, scenes = sample.media(), drawn(sample)
    assert 2 <= len(files) == len(scenes) <= 4
    for content, scene in zip(files, scenes, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
            assert picture.size == (scene.width_px, scene.height_px)


def test_clips_are_real_files_with_exact_rates() -> None:
    sample = samples_of("tracks", 1)[0]
    (content,), clip = sample.media(), drawn(sample)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert isinstance(clip, Clip)
        assert Fraction(stream.average_rate) == clip.frame_rate
        assert clip.frame_rate in FRAME_RATES
        assert sum(1 for _ in container.decode(stream)) == clip.n_frames
        assert (stream.width, stream.height) == (clip.width_px, clip.height_px)


@pytest.mark.parametrize("group", ["image points", "multi-image points"])
def test_points_are_worth_their_hits(group: str) -> None:
    for sample in samples_of(group, 4):
        places = true_places(sample)
        n = len(places)
        assert n >= 1
        right = sample.score(point_answer(places)).numbers
        assert right == {"n_hits": n, "n_predicted": n, "n_true": n}
        nothing = sample.score(point_answer([], status="none")).numbers
        assert nothing == sample.failed.numbers == {"n_hits": 0, "n_predicted": 0, "n_true": n}
        twice = sample.score(point_answer(places * 2)).numbers
        assert twice == {"n_hits": n, "n_predicted": 2 * n, "n_true": n}


def test_a_point_in_the_wrong_picture_is_a_miss() -> None:
    sample = samples_of("multi-image points", 1)[0]
    n_images = len(drawn(sample))
    query = parse_query(sample.text)
    places = [
        ((index + 1) % n_images, x, y)
        for index, x, y in true_places(sample)
        if not any(query.matches(o) for o in drawn(sample)[(index + 1) % n_images].objects)
    ]
    assert places
    assert sample.score(point_answer(places)).numbers["n_hits"] == 0


def test_counts_and_nones_are_right_or_wrong() -> None:
    counting = samples_of("counting", 6)
    for sample in counting:
        n = len(true_places(sample))
        answers = [
            api.CountAnswer(count=count, points=[], found=True, status="found", **SHARED)
            for count in (n, n + 1, None)
        ]
        assert [sample.score(answer).numbers["value"] for answer in answers] == [1.0, 0.0, 0.0]
    for sample in samples_of("none", 4):
        assert true_places(sample) == []
        unreadable = point_answer([], status="unreadable")
        assert sample.score(unreadable).numbers["value"] == 0.0
        assert sample.score(point_answer([], status="none")).numbers["value"] == 1.0
        assert sample.score(point_answer([])).numbers["value"] == 0.0
        assert sample.score(point_answer([(0, 0.5, 0.5)])).numbers["value"] == 0.0


def test_captions_are_read_object_by_object() -> None:
    scene = sample_scene(np.random.default_rng(2), n_objects=3)
    right = api.CaptionAnswer(caption=describe(scene), **SHARED)
    assert scoring.caption_score(right, scene).numbers == {
        "n_hits": 3,
        "n_predicted": 3,
        "n_true": 3,
    }
    first = scoring.named_objects(describe(scene)).most_common(1)[0][0]
    other = describe(scene).lower().replace(f"{first[0]} {first[1]}", "pink cube")
    wrong = scoring.caption_score(api.CaptionAnswer(caption=other, **SHARED), scene).numbers
    assert wrong["n_hits"] < 3
    empty = sample_scene(np.random.default_rng(2), n_objects=0)
    assert scoring.caption_score(right, empty).numbers["n_true"] == 0


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("blue", True), ("Blue.", True), ("The blue", True), ("light blue", False), ("", False)],
)
def test_words_are_compared_without_dress(answer: str, is_right: bool) -> None:
    assert scoring.same_word(answer, "blue") is is_right


def test_video_points_count_each_object_once() -> None:
    sample = samples_of("video points", 1)[0]
    clip, query = drawn(sample), parse_query(sample.text)
    first = clip.scene_at(0.0).objects
    places = [
        (0, o.x_px / clip.width_px, o.y_px / clip.height_px) for o in first if query.matches(o)
    ]
    numbers = sample.score(point_answer(places, time_s=0.0)).numbers
    assert numbers["n_hits"] == numbers["n_predicted"] == numbers["n_true"] == len(places)


def track_answer(clip: Clip, text: str, times_s: list[float], shift_x: float = 0.0) -> Any:
    query = parse_query(text)
    tracks = [
        api.Track(
            id=number,
            label=None,
            points=[
                api.TrackPoint(
                    t=t,
                    frame=0,
                    x=clip.positions(t)[number][0] / clip.width_px + shift_x,
                    y=clip.positions(t)[number][1] / clip.height_px,
                    pixel=api.Pixel(x=0, y=0),
                )
                for t in times_s
            ],
        )
        for number, item in enumerate(clip.objects)
        if query.matches(item)
    ]
    frames = [api.Frame(index=0, time=t) for t in (0.0, 0.5, 1.0, 1.5)]
    shared = {**SHARED, "frames": frames}
    return api.TrackAnswer(tracks=tracks, count=len(tracks), found=True, status="found", **shared)


def test_tracks_are_worth_the_mean_over_the_frames_seen() -> None:
    sample = samples_of("tracks", 1)[0]
    clip = drawn(sample)
    everywhere = track_answer(clip, sample.text, [0.0, 0.5, 1.0, 1.5])
    assert sample.score(everywhere).numbers == {"value": 1.0}
    half = track_answer(clip, sample.text, [0.0, 1.0])
    assert sample.score(half).numbers == {"value": 0.5}
    away = track_answer(clip, sample.text, [0.0, 0.5, 1.0, 1.5], shift_x=3.0)
    assert sample.score(away).numbers == {"value": 0.0}
    unseen = everywhere.model_copy(update={"frames": []})
    assert sample.score(unseen).numbers == sample.failed.numbers == {"value": 0.0}
