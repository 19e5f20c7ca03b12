"""The loader: trained times, frames of those times, no guessing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from molmo_core.videos import VideoGeometry, prepare_frames, probe_video, sample_times
from molmo_hf.video_io import decode_frames
from molmo_hf.video_processing_molmo2 import FRAME_TIMES
from molmo_server.engine.processing import frame_times_s
from molmo_server.engine.video_loader import TimedVideoLoader
from tests.support.conversations import draw_video

SETTINGS = {
    "num_frames": 384,
    "frame_sample_mode": "uniform_last_frame",
    "max_fps": 2,
    "sampling_fps": 2,
    "crop_px": 378,
    "most_frames": 384,
    "frame_cache_bytes": 0,
}


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(1)])
def test_frames_and_times_are_those_of_training(rate):
    file = draw_video(rate, 61 if rate > 1 else 5, 3, (96, 64))
    frames, metadata = TimedVideoLoader.load_bytes(file, **SETTINGS)
    times = sample_times(probe_video(file).duration_s, VideoGeometry())
    assert frame_times_s(metadata) == times
    assert metadata[FRAME_TIMES][-1] == pytest.approx(float(61 / rate if rate > 1 else 5))
    assert metadata["do_sample_frames"] is False
    expected = prepare_frames(decode_frames(file, times), VideoGeometry()).crops
    np.testing.assert_array_equal(prepare_frames(frames, VideoGeometry()).crops, expected)


def test_a_long_clip_is_spread_over_the_allowed_frames():
    file = draw_video(Fraction(24), 145, 4, (64, 48))
    frames, metadata = TimedVideoLoader.load_bytes(file, **{**SETTINGS, "num_frames": 5})
    assert frames.shape == (5, 378, 378, 3)
    np.testing.assert_allclose(metadata[FRAME_TIMES], np.linspace(0, 145 / 24, 5))


def test_unreadable_bytes_are_the_callers_fault():
    with pytest.raises(ValueError, match="send a complete mp4"):
        TimedVideoLoader.load_bytes(b"not a video", **SETTINGS)


def test_missing_settings_are_not_guessed():
    with pytest.raises(ValueError, match=r"without the video settings \['crop_px'"):
        TimedVideoLoader.load_bytes(b"", num_frames=32)
