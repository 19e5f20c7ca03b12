"""How much of a row's media the model sees in training: crops, images, frames and when.

Everything that varies is drawn from the generator of the example.
Knows: the choices of the recipes. Does not know: rows, files, pixels.
Source: spec of Molmo2's training, section 3; its golden times (A.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from molmo_core.errors import InvalidExample

FrameSampling = Literal[
    "uniform_last_frame", "uniform_last_frame_sample_fps", "uniform", "candidates"
]
"""uniform_last_frame: at one of the rates and the end, or evenly where those are too many frames;
uniform_last_frame_sample_fps: the same at a rate drawn between two, the first of them in a tenth of
the cases; uniform: evenly, the end left out; candidates: at the highest candidate rate that
reaches the end, the lowest one where none does."""

MAX_ANNOTATED_FPS = 10.0
"""Tracks are sampled at a multiple of their own rate, at most at this."""
_P_FIRST_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """What recipes choose; None leaves it to the geometry in `Tokenizing`."""

    max_images: int | None = None
    """Of a row with more the first are taken."""
    max_multi_image_crops: int | None = None
    """Most tiles of each of several images."""
    p_high_res: float = 0.0
    """How often a single image is cut into up to `high_res_crops` tiles."""
    high_res_crops: int = 24
    max_frames: int | None = None
    frame_sampling: FrameSampling = "uniform_last_frame"
    frame_rates: tuple[float, ...] = (2.0,)
    """Of each example one of them in training, else the first; empty: evenly over the clip."""
    candidate_rates: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 6, 8, 16)

    def __post_init__(self) -> None:
        if not 0 <= self.p_high_res <= 1:
            raise ValueError(f"p_high_res is {self.p_high_res}; give a share from 0 to 1")
        rates = self.frame_rates
        if self.frame_sampling == "uniform_last_frame_sample_fps" and len(rates) != 2:
            raise ValueError(f"frame_rates are {rates}; this sampling draws between two")
        if not all(rate > 0 for rate in (*rates, *self.candidate_rates)):
            raise ValueError("rates of frames have to be above 0")


PRETRAIN_MEDIA = MediaSettings(max_multi_image_crops=4, max_frames=16)
SFT_MEDIA = MediaSettings(max_images=5, max_multi_image_crops=8, max_frames=128)
LONG_CONTEXT_MEDIA = MediaSettings(max_images=5, max_multi_image_crops=8, max_frames=384)


def clip_of(duration_s: float, start_s: float | None, end_s: float | None) -> tuple[float, float]:
    """The part of a video, its end moved to the video's; raises InvalidExample for an empty one."""
    start = 0.0 if start_s is None else start_s
    end = duration_s if end_s is None else min(end_s, duration_s)
    if not 0 <= start < end:
        raise InvalidExample(
            f"the part from {start_s} s to {end_s} s of a video of {duration_s:g} s is empty: "
            "begin before the end of the video and of the part"
        )
    return start, end


def frame_times(
    duration_s: float,
    max_frames: int,
    settings: MediaSettings,
    rng: np.random.Generator,
    *,
    is_training: bool = True,
) -> list[float]:
    """Seconds from the begin of the clip."""
    mode, rates = settings.frame_sampling, settings.frame_rates
    if mode == "uniform":
        times = np.linspace(0, duration_s, num=max_frames, endpoint=False)
        return [float(t) for t in times]
    if mode == "candidates":
        return times_at_best_rate(duration_s, max_frames, settings.candidate_rates)
    if mode == "uniform_last_frame_sample_fps":
        low, high = rates
        is_first = not is_training or rng.random() < _P_FIRST_RATE
        rate = low if is_first else float(rng.uniform(low, high))
        return _times_with_end(duration_s, max_frames, rate)
    if not rates:
        return _times_with_end(duration_s, max_frames, None)
    drawn = rates[int(rng.integers(len(rates)))] if is_training and len(rates) > 1 else rates[0]
    return _times_with_end(duration_s, max_frames, drawn)


def annotated_frame_times(
    duration_s: float, max_frames: int, *, annotated_fps: float, source_fps: float
) -> list[float]:
    """Times that hold the moments at which tracks are annotated, `annotated_fps` a second."""
    multiples = np.arange(1, int(MAX_ANNOTATED_FPS / annotated_fps) + 1) * annotated_fps
    frames_each = source_fps / multiples
    is_whole = np.abs(frames_each - np.round(frames_each)) < 1e-3
    rates = multiples[is_whole & (frames_each > 0.5)]
    return times_at_best_rate(duration_s, max_frames, rates.tolist() or [annotated_fps])


def times_at_best_rate(duration_s: float, max_frames: int, rates: Sequence[float]) -> list[float]:
    """At the highest rate that reaches the end; at the lowest up to the last frame allowed."""
    covering = [rate for rate in rates if max_frames / rate >= duration_s]
    rate = max(covering, default=min(rates))
    return [float(t) for t in np.arange(max_frames) / rate if t < duration_s]


def _times_with_end(duration_s: float, max_frames: int, rate: float | None) -> list[float]:
    if rate is None or (max_frames - 1) / rate < duration_s:
        return [float(t) for t in np.linspace(0, duration_s, num=max_frames)]
    # Rounding may let one time too many in before the end.
    times_s = np.arange(0.0, duration_s, 1 / rate)[: max_frames - 1]
    return [*(float(t) for t in times_s), float(duration_s)]
