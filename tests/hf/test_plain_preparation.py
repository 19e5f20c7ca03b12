"""Preparation against the plain algorithm of the specification: the same values, all of them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from molmo_core.images import ImageGeometry, prepare_image
from molmo_core.pixels import normalised, resize_bilinear, to_patches
from molmo_core.videos import VideoGeometry, sample_part
from molmo_hf.video_io import sample_file
from tests.bench.plain import patchify, plain_image, plain_video, resize
from tests.bench.preprocessing import assert_equal, drawn_video, ours_image, ours_video
from tests.support.conversations import draw_video

FILE = drawn_video(96, 64, n_frames=90)
"""3 s at 30 frames a second."""


@pytest.mark.parametrize(
    ("size_hw", "max_crops"),
    [
        ((480, 640), 8),
        ((200, 1500), 8),
        ((700, 150), 1),
        ((113, 130), 8),
        ((378, 378), 2),
        ((901, 1203), 24),
    ],
)
def test_pictures(size_hw, max_crops):
    pixels = np.random.default_rng(sum(size_hw)).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    prepared = prepare_image(pixels, ImageGeometry(max_crops=max_crops))
    plain = plain_image(pixels, max_crops)
    np.testing.assert_array_equal(prepared.pooling, plain.pooling)
    np.testing.assert_array_equal(prepared.crops, plain.crops)


def test_pictures_that_are_not_contiguous():
    pixels = np.random.default_rng(1).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    turned = np.rot90(pixels)
    assert_equal(plain_image(np.ascontiguousarray(turned)), ours_image(turned))
    assert_equal(plain_image(pixels[:, ::-1].copy()), ours_image(pixels[:, ::-1]))


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 9), (7, 3), (16, 17), (33, 64)])
@pytest.mark.parametrize("to_hw", [(1, 1), (5, 40), (17, 16), (64, 33)])
def test_resizing_small_pictures(size_hw, to_hw):
    pixels = np.random.default_rng(2).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_bilinear(pixels, to_hw), resize(pixels, *to_hw))


def test_every_byte_is_normalised_alike():
    crops = np.arange(378 * 378 * 3, dtype=np.uint8).reshape(1, 378, 378, 3)
    steps = ((crops.astype(np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(normalised(to_patches(crops, 14)), patchify(steps))


def test_a_video_of_which_frames_are_left_out():
    """x264's own choice of frames: half of them stand for nothing else and are not decoded."""
    file = FILE
    assert_equal(plain_video(file), ours_video(file))


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001)])
def test_a_video_of_few_frames(rate):
    file = draw_video(rate, 31, 5, (96, 64))
    assert_equal(plain_video(file), ours_video(file))


def test_a_part_is_a_clip_that_begins_at_0():
    file = FILE
    whole = sample_file(file, VideoGeometry(asked_fps=30))
    info, times, frames = sample_file(
        file, VideoGeometry(start_s=1.0, end_s=2.1, asked_fps=5, crop_px=378)
    )
    assert (times.start_s, times.clip_s[:2]) == (1.0, (0.0, 0.2))
    assert times.clip_s[-1] == pytest.approx(1.1)
    assert times == sample_part(info, VideoGeometry(start_s=1.0, end_s=2.1, asked_fps=5))
    shown = [info.frame_at(time_s) for time_s in times.file_s]
    assert shown == [30, 36, 42, 48, 54, 60, 63]
    np.testing.assert_array_equal(frames, whole.frames[shown])


@pytest.mark.parametrize(
    ("mode", "asked", "expected"),
    [
        ("uniform_last_frame", {"asked_fps": 1.0}, [0.0, 1.0, 2.0, 3.0]),
        ("uniform_last_frame", {"asked_fps": 4.0, "max_frames": 4}, [0.0, 1.0, 2.0, 3.0]),
        ("uniform_last_frame", {"max_frames": 1}, [0.0]),
        ("fps", {"asked_fps": 0.5}, [0.0, 2.0]),
        ("fps", {"asked_fps": 1.0, "start_s": 1.0}, [0.0, 1.0]),
    ],
)
def test_rates_that_are_asked_for(mode, asked, expected):
    info = sample_file(FILE, VideoGeometry()).info
    times = sample_part(info, VideoGeometry(sample_mode=mode, **asked))
    assert times.clip_s == pytest.approx(expected)
