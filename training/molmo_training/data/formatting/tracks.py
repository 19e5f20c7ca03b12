"""Rows that follow objects over time: every moment, the first and last, or on from one point.

Fields: `label`, `tracks`: a list of {time_s, points: [{id, x, y, occluded}]}, `sampling_fps` (2),
for a single point `object_id` where it is one certain object.
Knows: which annotated moments the model sees and which it is asked for. Does not know: prefixes.
Source: spec of Molmo2's training, section 4.2.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np

from molmo_core.errors import InvalidExample
from molmo_core.points import (
    NO_TRACKS_TEXT,
    PointGroup,
    TrackFrame,
    render_points,
    render_tracks,
)
from molmo_core.prompts import TRACK_FPS
from molmo_training.data.formatting.media import RowMedia, scale_of
from molmo_training.data.formatting.row import (
    Row,
    flag,
    invalid,
    number,
    optional_number,
    optional_text,
    rows,
    text,
    xy_of,
)
from molmo_training.data.formatting.settings import FormatSettings
from molmo_training.data.formatting.templates import fill_template

TRACK_GROUPS = {
    "video_point_track_per_frame": "video_point_track_per_frame",
    "video_point_track_start_end": "video_point_ground_start_end",
    "video_point_ground_start_end": "video_point_ground_start_end",
    "video_single_point_track_per_frame": "video_single_point_track_per_frame",
    "video_single_point_track_start_end": "video_single_point_track_start_end",
}
"""The template group of each style."""

_SAME_MOMENT_S = 1e-2
_P_UNNAMED_RATE = 0.5


def track(
    row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator
) -> tuple[str, str]:
    """The question and the `<tracks>` of the row."""
    style, label = text(row, "style"), text(row, "label")
    fps = rate_of(row)
    frames = seen_frames(_read_frames(row, media), media.frame_times_s)
    is_ends_only = style.endswith("start_end")
    if not is_ends_only:
        frames = on_grid(frames, fps)
    slots = {"label": label, "fps": f"{fps:g}"}
    if style.startswith("video_single_point"):
        frames, query = _follow_one(row, frames, settings, rng)
        frames = frames[-1:] if is_ends_only else frames
        try:
            slots["input_points"] = render_points([query], label, clip=flag(row, "clip_points"))
        except ValueError as error:
            raise invalid(row, "tracks", f"points inside their scale ({error})") from error
    elif is_ends_only:
        frames = ends_only(frames)
    question = optional_text(row, "question") or _question(style, slots, fps, settings, rng)
    return question, _answer(row, frames, label, settings)


def rate_of(row: Row) -> float:
    """Annotated moments a second of a row with tracks."""
    fps = optional_number(row, "sampling_fps")
    fps = TRACK_FPS if fps is None else fps
    if fps <= 0:
        raise invalid(row, "sampling_fps", "a rate above 0")
    return fps


def _read_frames(row: Row, media: RowMedia) -> list[TrackFrame]:
    scale_xy = scale_of(row, media)
    frames = []
    for moment in rows(row, "tracks"):
        points: dict[Hashable, tuple[float, float]] = {}
        for point in rows(moment, "points"):
            if not isinstance(point.get("id"), str | Integral):
                raise invalid(point, "id", "a number or name that an object keeps over the frames")
            if not flag(point, "occluded"):
                points[point["id"]] = xy_of(row, "tracks", point)
        frames.append(TrackFrame(time_s=number(moment, "time_s"), points=points, scale_xy=scale_xy))
    return sorted(frames, key=lambda frame: frame.time_s)


def seen_frames(frames: Sequence[TrackFrame], frame_times_s: Sequence[float]) -> list[TrackFrame]:
    """The annotated moments at which the model sees a frame."""
    times = np.asarray(frame_times_s, dtype=np.float64)
    return [f for f in frames if np.any(np.abs(times - f.time_s) <= _SAME_MOMENT_S)]


def on_grid(frames: Sequence[TrackFrame], fps: float) -> list[TrackFrame]:
    """Those that lie on whole multiples of 1/fps seconds."""
    return [f for f in frames if abs(round(f.time_s * fps) / fps - f.time_s) <= _SAME_MOMENT_S]


def ends_only(frames: Sequence[TrackFrame]) -> list[TrackFrame]:
    """Each object at its first and its last appearance only."""
    appears: dict[Hashable, list[float]] = {}
    for frame in frames:
        for key in frame.points:
            appears.setdefault(key, []).append(frame.time_s)
    return [
        replace(
            frame,
            points={
                key: xy
                for key, xy in frame.points.items()
                if frame.time_s in (appears[key][0], appears[key][-1])
            },
        )
        for frame in frames
    ]


def _follow_one(
    row: Row, frames: Sequence[TrackFrame], settings: FormatSettings, rng: np.random.Generator
) -> tuple[list[TrackFrame], PointGroup]:
    """The frames of one object behind the moment at which it is pointed out, and that point."""
    keys = sorted({key for frame in frames for key in frame.points}, key=str)
    wanted = row.get("object_id")
    if wanted is not None:
        keys = [key for key in keys if key == wanted]
    if not keys:
        raise InvalidExample(
            f"no point of object {wanted if wanted is not None else ''} in `tracks` is visible at "
            "a sampled moment: give annotations at the times of sampled frames"
        )
    key = keys[int(rng.integers(len(keys)))]
    visible = [frame for frame in frames if key in frame.points]
    start = 0
    if settings.is_training and rng.random() < settings.p_random_query_point:
        start = int(rng.integers(len(visible)))
    first = visible[start]
    query = PointGroup(points=[first.points[key]], time_s=first.time_s, scale_xy=first.scale_xy)
    behind = [replace(f, points={key: f.points[key]}) for f in visible[start + 1 :]]
    return behind, query


def _question(
    style: str,
    slots: dict[str, str],
    fps: float,
    settings: FormatSettings,
    rng: np.random.Generator,
) -> str:
    if settings.prompt_templates == "none":
        return slots.get("input_points") or slots["label"].lower()
    group = TRACK_GROUPS[style]
    is_usual = style == "video_point_track_per_frame" and fps == TRACK_FPS
    if is_usual and rng.random() < _P_UNNAMED_RATE:
        group = "video_point_track_per_frame_default_fps"
    return fill_template(group, rng, **slots)


def _answer(row: Row, frames: Sequence[TrackFrame], label: str, settings: FormatSettings) -> str:
    try:
        tag = render_tracks(
            frames, label, tag_format=settings.pointing_format, clip=flag(row, "clip_points")
        )
    except ValueError as error:
        raise invalid(row, "tracks", f"points inside their scale ({error})") from error
    return tag or NO_TRACKS_TEXT
