"""The drawn clips keep their promises: paths, pixels and files that decode to what was drawn."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from molmo_core.clips import (
    FRAME_RATES,
    AxisMotion,
    Clip,
    draw_frame,
    draw_frames,
    sample_clip,
    write_clip,
)
from molmo_core.scenes import draw_background, draw_scene, parse_query


def many_clips(n_clips: int) -> list[Clip]:
    rng = np.random.default_rng(31)
    return [sample_clip(rng) for _ in range(n_clips)]


def paths_px(clip: Clip, n_times: int = 200) -> np.ndarray:
    """(n_times, n_objects, 2)"""
    return np.array([clip.positions(t) for t in np.linspace(0, clip.duration_s, n_times)])


def test_clips_have_the_promised_sizes_rates_and_durations():
    clips = many_clips(300)
    for clip in clips:
        sides_px = sorted((clip.width_px, clip.height_px))
        assert sides_px[0] >= 160
        assert sides_px[1] <= min(1024, 2 * sides_px[0])
        assert clip.width_px % 2 == clip.height_px % 2 == 0
        assert 2.0 <= clip.duration_s <= 8.0
        assert clip.n_frames == round(clip.duration_s * clip.fps)
    assert {clip.frame_rate for clip in clips} == set(FRAME_RATES)
    assert {round(clip.fps, 2) for clip in clips} == {24.0, 25.0, 29.97, 30.0}
    assert {len(clip.objects) for clip in clips} == {1, 2, 3, 4}


def test_objects_move_inside_and_never_touch():
    for clip in many_clips(60):
        path_px = paths_px(clip)
        radii_px = np.array([item.look.radius_px for item in clip.objects])
        assert (path_px >= radii_px[:, None] - 1e-6).all()
        assert (
            path_px <= np.array([clip.width_px, clip.height_px]) - radii_px[:, None] + 1e-6
        ).all()
        for one, other in itertools.combinations(range(len(radii_px)), 2):
            distance_px = np.linalg.norm(path_px[:, one] - path_px[:, other], axis=1).min()
            assert distance_px >= radii_px[one] + radii_px[other]
        share = np.abs(np.diff(path_px, axis=0)) / (clip.width_px, clip.height_px)
        length = np.linalg.norm(share, axis=2).sum(axis=0)
        assert (length > 0.08).all()
        assert (length <= 0.61).all()


def test_a_motion_starts_where_it_says_and_bounces():
    motion = AxisMotion(start_px=10.0, low_px=0.0, high_px=20.0, velocity_px_s=5.0)
    times_s = np.array([0.0, 1.0, 2.0, 3.0, 6.0, 7.0])
    np.testing.assert_allclose(motion.at(times_s), [10, 15, 20, 15, 0, 5])
    swing = AxisMotion(
        start_px=10.0, low_px=0.0, high_px=20.0, swing_px=4.0, frequency_hz=0.25, phase_rad=0.0
    )
    np.testing.assert_allclose(swing.at(np.array([0.0, 1.0, 2.0, 3.0])), [10, 14, 10, 6])


def test_time_zero_is_the_look_of_every_object():
    for clip in many_clips(10):
        starts = [(item.look.x_px, item.look.y_px) for item in clip.objects]
        np.testing.assert_allclose(clip.positions(0.0), starts)


def test_frames_show_each_object_where_it_is():
    for clip in many_clips(15):
        times_s = [0.0, clip.duration_s / 3, clip.duration_s]
        frames = draw_frames(clip, times_s)
        assert frames.shape == (3, clip.height_px, clip.width_px, 3)
        for frame, time_s in zip(frames, times_s, strict=True):
            np.testing.assert_array_equal(frame, draw_scene(clip.scene_at(time_s)))
            for (x_px, y_px), item in zip(clip.positions(time_s), clip.objects, strict=True):
                assert tuple(frame[int(y_px), int(x_px)]) == item.look.rgb


def test_a_given_background_is_used_and_left_alone():
    clip = many_clips(1)[0]
    background = draw_background(clip.background, clip.width_px, clip.height_px)
    before = background.copy()
    np.testing.assert_array_equal(
        draw_frame(clip, 1.0, background=background), draw_frame(clip, 1.0)
    )
    np.testing.assert_array_equal(background, before)


def test_queries_look_at_moving_objects_too():
    for clip in many_clips(5):
        for item in clip.objects:
            assert parse_query(f"the {item.colour} {item.shape}").matches(item)
            assert not parse_query("stars").matches(item) or item.shape == "star"


def test_a_seed_fixes_the_clip():
    first, again, other = (sample_clip(np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_a_clip_is_always_the_same_file(tmp_path: Path):
    files = set()
    for seed in (0, 1, 2):
        clip = sample_clip(np.random.default_rng(seed), max_side_px=260, max_duration_s=2.1)
        kept = []  # moves the encoder's buffers to memory with other contents each time
        for n_kilobytes in (10, 100, 1000, 3000):
            kept.append(np.full(n_kilobytes * 1024, n_kilobytes % 251, dtype=np.uint8))
            write_clip(clip, tmp_path / "clip.mp4")
            files.add((seed, (tmp_path / "clip.mp4").read_bytes()))
    assert len(files) == 3


@pytest.mark.parametrize("frame_rate", FRAME_RATES, ids=str)
def test_files_decode_to_the_frames_that_were_drawn(frame_rate: Fraction, tmp_path: Path):
    rng = np.random.default_rng(9)
    while (clip := sample_clip(rng, max_side_px=320, max_duration_s=2.4)).frame_rate != frame_rate:
        pass
    path = tmp_path / "clip.mp4"
    write_clip(clip, path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == frame_rate
        assert stream.frames == clip.n_frames
        frames = list(container.decode(stream))
    assert len(frames) == clip.n_frames
    for index, frame in enumerate(frames):
        assert frame.time == pytest.approx(index / clip.fps, abs=1e-4)
        pixels = frame.to_ndarray(format="rgb24").astype(int)
        assert pixels.shape == (clip.height_px, clip.width_px, 3)
        for (x_px, y_px), item in zip(clip.positions(index / clip.fps), clip.objects, strict=True):
            assert np.abs(pixels[int(y_px), int(x_px)] - item.look.rgb).max() < 30
    error = np.abs(pixels - draw_frame(clip, index / clip.fps)).mean()
    assert error < 8


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"n_objects": 0}, "n_objects is 0, a clip holds 1 to 4"),
        ({"n_objects": 5}, "n_objects is 5"),
        ({"min_duration_s": 9.0}, "durations are 9.0 to 8.0 s"),
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        sample_clip(np.random.default_rng(0), **limits)


def test_speed_is_even_on_a_straight_path():
    motion = AxisMotion(start_px=5.0, low_px=0.0, high_px=100.0, velocity_px_s=7.0)
    steps_px = np.diff(motion.at(np.linspace(0, 4, 9)))
    np.testing.assert_allclose(steps_px, 3.5)
    assert math.isclose(float(motion.at(4.0)), 33.0)
