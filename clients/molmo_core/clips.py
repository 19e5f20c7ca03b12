"""Drawn clips: the objects of a drawn scene on smooth paths, with exact ground truth at any time.

Knows: paths, frame rates, how a frame is drawn and how a clip becomes an mp4 file. Does not know:
which frames a model samples, prompts, track formats. Coordinates are those of `scenes`; frame k
shows the time k / fps. Source: this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from molmo_core.scenes import (
    GAP_FRACTION,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
    Background,
    Scene,
    SceneObject,
    draw_background,
    draw_objects,
    sample_scene,
)

FRAME_RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))
MAX_MOVING_OBJECTS = 4
MIN_DURATION_S, MAX_DURATION_S = 2.0, 8.0
TRAVEL_FRACTION = (0.15, 0.6)  # of the canvas, along an object's path over the whole clip

_N_CHECKED_TIMES = 96  # objects move less than half a gap between two of them
_ENCODER = {
    "crf": "20",
    "preset": "veryfast",
    # x264 165 with mbtree gave other bytes for the same frames in 5 of 8 clips tried.
    "x264-params": "mbtree=0:cpu-independent=1",
}
_SMPTE170M = 6  # the colour matrix that the encoder is fed with, written into the stream


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisMotion:
    """One coordinate over time: a drift plus a swing around `start_px`, thrown back at both ends
    of [low_px, high_px]."""

    start_px: float
    low_px: float
    high_px: float
    velocity_px_s: float = 0.0
    swing_px: float = 0.0
    frequency_hz: float = 0.0
    phase_rad: float = 0.0

    def at(self, time_s: float | np.ndarray) -> np.ndarray:
        """Pixels, in the shape of `time_s`; `start_px` at time 0."""
        time_s = np.asarray(time_s)
        angle_rad = 2 * math.pi * self.frequency_hz * time_s + self.phase_rad
        swing_px = self.swing_px * (np.sin(angle_rad) - math.sin(self.phase_rad))
        free_px = self.start_px + self.velocity_px_s * time_s + swing_px
        span_px = self.high_px - self.low_px
        folded_px = np.mod(free_px - self.low_px, 2 * span_px)
        return self.high_px - np.abs(folded_px - span_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingObject:
    """`look` is the object as it is at time 0."""

    look: SceneObject
    x: AxisMotion
    y: AxisMotion

    @property
    def shape(self) -> str:
        return self.look.shape

    @property
    def colour(self) -> str:
        return self.look.colour

    def at(self, time_s: float) -> SceneObject:
        return replace(self.look, x_px=float(self.x.at(time_s)), y_px=float(self.y.at(time_s)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Both sides are even, as 4:2:0 video needs."""

    width_px: int
    height_px: int
    frame_rate: Fraction
    n_frames: int
    background: Background
    objects: tuple[MovingObject, ...]

    @property
    def fps(self) -> float:
        return float(self.frame_rate)

    @property
    def duration_s(self) -> float:
        return float(self.n_frames / self.frame_rate)

    def positions(self, time_s: float) -> tuple[tuple[float, float], ...]:
        """(x_px, y_px) of each object, in the order of `objects`."""
        return tuple((item.x_px, item.y_px) for item in self.scene_at(time_s).objects)

    def scene_at(self, time_s: float) -> Scene:
        return Scene(
            width_px=self.width_px,
            height_px=self.height_px,
            background=self.background,
            objects=tuple(item.at(time_s) for item in self.objects),
        )


def sample_clip(
    rng: np.random.Generator,
    *,
    n_objects: int | None = None,
    min_side_px: int = MIN_SIDE_PX,
    max_side_px: int = MAX_SIDE_PX,
    min_duration_s: float = MIN_DURATION_S,
    max_duration_s: float = MAX_DURATION_S,
) -> Clip:
    """A random clip of 1-4 objects that stay inside and never touch."""
    if n_objects is None:
        n_objects = int(rng.integers(1, MAX_MOVING_OBJECTS + 1))
    if not 1 <= n_objects <= MAX_MOVING_OBJECTS:
        raise ValueError(f"n_objects is {n_objects}, a clip holds 1 to {MAX_MOVING_OBJECTS}")
    if not 0 < min_duration_s <= max_duration_s:
        raise ValueError(
            f"durations are {min_duration_s} to {max_duration_s} s, they must be positive and rise"
        )
    frame_rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    fewest = math.ceil(Fraction(min_duration_s) * frame_rate)
    most = max(fewest, math.floor(Fraction(max_duration_s) * frame_rate))
    n_frames = int(rng.integers(fewest, most + 1))
    while True:
        scene = sample_scene(
            rng,
            n_objects=n_objects,
            min_side_px=min_side_px,
            max_side_px=max_side_px,
            side_multiple_px=2,
        )
        objects = _sample_motions(rng, scene, float(n_frames / frame_rate))
        if objects is not None:
            break
    return Clip(
        width_px=scene.width_px,
        height_px=scene.height_px,
        frame_rate=frame_rate,
        n_frames=n_frames,
        background=scene.background,
        objects=objects,
    )


def _sample_motions(
    rng: np.random.Generator, scene: Scene, duration_s: float
) -> tuple[MovingObject, ...] | None:
    """Paths that keep the objects apart at all times; None if this scene is too tight for that."""
    times_s = np.linspace(0.0, duration_s, _N_CHECKED_TIMES)
    gap_px = GAP_FRACTION * min(scene.width_px, scene.height_px)
    moving: list[MovingObject] = []
    paths: list[tuple[np.ndarray, np.ndarray]] = []
    for look in scene.objects:
        for _ in range(30):
            item = _sample_motion(rng, look, scene, duration_s)
            x_px, y_px = item.x.at(times_s), item.y.at(times_s)
            if all(
                np.hypot(x_px - x2_px, y_px - y2_px).min()
                >= look.radius_px + other.look.radius_px + gap_px / 2
                for other, (x2_px, y2_px) in zip(moving, paths, strict=True)
            ):
                break
        else:
            return None
        moving.append(item)
        paths.append((x_px, y_px))
    return tuple(moving)


def _sample_motion(
    rng: np.random.Generator, look: SceneObject, scene: Scene, duration_s: float
) -> MovingObject:
    """Straight with bounces, a wave, or part of an ellipse; never a path longer than the share of
    the canvas in TRAVEL_FRACTION."""
    sides_px = (scene.width_px, scene.height_px)
    starts_px = (look.x_px, look.y_px)
    travel = rng.uniform(*TRAVEL_FRACTION)
    heading_rad = rng.uniform(0.0, 2 * math.pi)
    drift = np.array([math.cos(heading_rad), math.sin(heading_rad)]) * travel / duration_s
    swing, phase_rad, n_periods = np.zeros(2), np.zeros(2), 0.0
    kind = rng.choice(("straight", "wave", "ellipse"), p=(0.5, 0.25, 0.25))
    if kind == "wave":
        # The swing of one axis takes a quarter of the path, four amplitudes a period.
        n_periods = rng.uniform(0.5, 1.5)
        drift *= 0.75
        swing[rng.integers(2)] = 0.25 * travel / (4 * n_periods)
        phase_rad[:] = rng.uniform(0.0, 2 * math.pi)
    elif kind == "ellipse":
        n_periods = rng.uniform(0.4, 1.0)
        drift *= 0.0
        swing[:] = travel / (2 * math.pi * n_periods) * np.array([1.0, rng.uniform(0.5, 1.0)])
        phase_rad[:] = heading_rad + np.array([0.0, rng.choice((-1, 1)) * math.pi / 2])
    x, y = (
        AxisMotion(
            start_px=starts_px[axis],
            low_px=look.radius_px,
            high_px=sides_px[axis] - look.radius_px,
            velocity_px_s=float(drift[axis] * sides_px[axis]),
            swing_px=float(swing[axis] * sides_px[axis]),
            frequency_hz=float(n_periods / duration_s),
            phase_rad=float(phase_rad[axis]),
        )
        for axis in range(2)
    )
    return MovingObject(look=look, x=x, y=y)


def draw_frame(clip: Clip, time_s: float, *, background: np.ndarray | None = None) -> np.ndarray:
    """(height, width, 3) uint8. `background` is the clip's own, drawn once by the caller
    (`draw_background`) and left as it is; without it, it is drawn again."""
    if background is None:
        background = draw_background(clip.background, clip.width_px, clip.height_px)
    return draw_objects(clip.scene_at(time_s).objects, background)


def draw_frames(clip: Clip, times_s: Sequence[float]) -> np.ndarray:
    """(n_times, height, width, 3) uint8."""
    background = draw_background(clip.background, clip.width_px, clip.height_px)
    frames = np.empty((len(times_s), *background.shape), dtype=np.uint8)
    for frame, time_s in zip(frames, times_s, strict=True):
        frame[:] = draw_frame(clip, time_s, background=background)
    return frames


def write_clip(clip: Clip, path: str | Path) -> None:
    """H.264 in mp4, yuv420p, at the clip's exact frame rate; the same bytes for the same clip."""
    background = draw_background(clip.background, clip.width_px, clip.height_px)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.frame_rate, options=dict(_ENCODER))
        stream.width, stream.height = clip.width_px, clip.height_px
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the output depends on it
        stream.codec_context.colorspace = _SMPTE170M
        for index in range(clip.n_frames):
            time_s = float(index / clip.frame_rate)
            pixels = draw_frame(clip, time_s, background=background)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU601")))
        container.mux(stream.encode())
