"""Drawn clips as rows of datasets: points at moments, tracks, questions, captions, speech.

Tracks are annotated twice a second. Nothing is encoded: a frame is drawn when it is opened.
Knows: which questions have which answers. Does not know: which frames are sampled, templates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molmo_core.clips import Clip, draw_frames, sample_clip
from molmo_core.pixels import resize_bilinear
from molmo_core.prompts import verb_prompt
from molmo_core.scene_questions import attribute_questions
from molmo_core.scenes import Query, Scene, grid_place, sample_queries
from molmo_core.videos import VideoInfo
from molmo_training.data.example import MarkedObject
from molmo_training.data.formatting.row import Row
from molmo_training.data.scenes import clip_info, marks_of, spoken
from molmo_training.datasets.drawn import as_asked, options_for
from molmo_training.datasets.drawn_tables import register_drawn

ANNOTATED_FPS = 2.0
Marks = list[list[MarkedObject]]


@dataclass(frozen=True)
class DrawnVideo:
    """A clip as a video whose frames are drawn when they are opened."""

    clip: Clip

    @cached_property
    def info(self) -> VideoInfo:
        return clip_info(self.clip)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.clip.height_px, self.clip.width_px

    def frames_at(self, times_s: Sequence[float], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        frames = draw_frames(self.clip, [self.shown_s(time_s) for time_s in times_s])
        return np.stack([resize_bilinear(frame, size_hw) for frame in frames])

    def shown_s(self, time_s: float) -> float:
        """The time of the frame that is displayed."""
        return self.info.frame_times_s[self.info.frame_at(time_s)]

    def scene_at(self, time_s: float) -> Scene:
        return self.clip.scene_at(self.shown_s(time_s))

    def marks(self, times_s: Sequence[float]) -> Marks:
        """The objects of each frame, in all of them numbered alike."""
        return [marks_of([self.scene_at(time_s)])[0] for time_s in times_s]

    @property
    def annotated_s(self) -> list[float]:
        return [float(t) for t in np.arange(0, self.clip.duration_s, 1 / ANNOTATED_FPS)]


def _row(video: DrawnVideo, parts: Sequence[Row], **fields: Any) -> Row:
    scale = {"width": video.clip.width_px, "height": video.clip.height_px, "clip_points": True}
    media = {"video": video, "objects": video.marks}
    return {**media, **scale, **fields, "message_list": list(parts)}


def _about(query: Query, clip: Clip) -> list[int]:
    return [number for number, item in enumerate(clip.objects) if query.matches(item)]


def draw_tracks(rng: np.random.Generator, *, style: str) -> Row:
    video = DrawnVideo(sample_clip(rng))
    single = style.startswith("video_single_point")
    queries = sample_queries(rng, video.clip.objects, 2, negative_rate=0.0 if single else 0.2)
    parts: list[Row] = []
    for query in queries:
        about = _about(query, video.clip)
        if single:
            about = [about[int(rng.integers(len(about)))]]
        part = {"style": style, "label": spoken(query.label), "about": about}
        if style == "video_point_track_per_frame":
            part |= as_asked("track", query, has_video=True)
        parts.append({**part, "tracks": _track_moments(video, about)})
    return _row(video, parts, sampling_fps=ANNOTATED_FPS)


def _track_moments(video: DrawnVideo, numbers: Sequence[int]) -> list[Row]:
    moments: list[Row] = []
    for time_s in video.annotated_s:
        objects = video.scene_at(time_s).objects
        points = [{"id": k, "x": objects[k].x_px, "y": objects[k].y_px} for k in numbers]
        moments.append({"time_s": time_s, "points": points})
    return moments


_POINT_STYLES = ("video_point", "video_point_count", "video_count", "video_count_point")


def draw_points(rng: np.random.Generator) -> Row:
    """Each object at one moment; the server's question at the first."""
    video = DrawnVideo(sample_clip(rng))
    times_s = video.annotated_s
    parts: list[Row] = []
    for query in sample_queries(rng, video.clip.objects, 3):
        about = _about(query, video.clip)
        style = _POINT_STYLES[int(rng.choice(4, p=(0.55, 0.25, 0.1, 0.1)))]
        part: dict[str, Any] = {"style": style, "label": spoken(query.label), "about": about}
        moments = {k: times_s[int(rng.integers(len(times_s)))] for k in about}
        if style == "video_point" and rng.random() < 0.7:
            part["prompt"] = verb_prompt("point", query.label, has_video=True)
            moments = dict.fromkeys(about, 0.0)
        parts.append({**part, "points": _point_moments(video, moments)})
    return _row(video, parts)


def _point_moments(video: DrawnVideo, moments: dict[int, float]) -> list[Row]:
    grouped: list[Row] = []
    for time_s in sorted(set(moments.values())):
        objects = video.scene_at(time_s).objects
        points = [[objects[k].x_px, objects[k].y_px] for k, at in moments.items() if at == time_s]
        grouped.append({"time_s": time_s, "points": points})
    return grouped


def _questions(video: DrawnVideo) -> list[tuple[str, str]]:
    clip = video.clip
    asked = attribute_questions(clip.objects)
    kinds = Counter((item.colour, item.shape) for item in clip.objects)
    for number, item in enumerate(clip.objects):
        if kinds[item.colour, item.shape] == 1:
            end = video.scene_at(clip.duration_s).objects[number]
            place = grid_place(end.x_px / clip.width_px, end.y_px / clip.height_px)
            asked.append((f"Where is the {item.colour} {item.shape} in the end?", place))
    return [*asked, ("How many objects are there?", f"{len(clip.objects)}")]


def draw_questions(rng: np.random.Generator) -> Row:
    """Short answers and multiple choice."""
    video = DrawnVideo(sample_clip(rng))
    asked = _questions(video)
    parts: list[Row] = []
    for k in rng.permutation(len(asked))[:3]:
        question, answer = asked[int(k)]
        options = options_for(answer, rng)
        part: dict[str, Any] = {"style": "video_short_answer", "answer": answer}
        if options and rng.random() < 0.5:
            part = {"style": "video_multiple_choice", "options": options}
            part["answer_idx"] = options.index(answer)
        parts.append({"question": question, **part})
    return _row(video, parts)


def draw_captions(rng: np.random.Generator) -> Row:
    """What moves from where to where, and what a part of the clip ends with."""
    video = DrawnVideo(sample_clip(rng))
    clip = video.clip
    start_s, end_s = 0.0, float(round(clip.duration_s * rng.uniform(0.5, 0.9), 1))
    parts: list[Row] = [
        {"style": "video_short_caption", "text": _seen(clip)},
        {"style": "video_long_caption", "text": _moves(video, 0.0, clip.duration_s)},
        {
            "style": "video_clip_caption_start_end",
            "start_s": start_s,
            "end_s": end_s,
            "text": _moves(video, start_s, end_s),
        },
    ]
    kept = sorted(rng.permutation(len(parts))[:2].tolist())
    return _row(video, [parts[k] for k in kept], weight=0.5)


def _seen(clip: Clip) -> str:
    return f"A video of {' and '.join(f'a {i.colour} {i.shape}' for i in clip.objects)}."


def _moves(video: DrawnVideo, start_s: float, end_s: float) -> str:
    clip, sentences = video.clip, []
    for first, last in zip(
        video.scene_at(start_s).objects, video.scene_at(end_s).objects, strict=True
    ):
        places = [
            grid_place(item.x_px / clip.width_px, item.y_px / clip.height_px)
            for item in (first, last)
        ]
        sentences.append(f"The {first.colour} {first.shape} goes from {places[0]} to {places[1]}.")
    return " ".join(sentences)


def draw_speech(rng: np.random.Generator) -> Row:
    """A question that only the subtitles answer."""
    video = DrawnVideo(sample_clip(rng))
    said = video.clip.objects[int(rng.integers(len(video.clip.objects)))]
    time_s = float(round(rng.uniform(0, video.clip.duration_s - 1), 1))
    line = {"start_s": time_s, "end_s": time_s + 1.0, "text": f"look at the {said.colour} one"}
    options = options_for(said.colour, rng)
    part = {
        "style": "video_multiple_choice_w_subtitle",
        "question": "Which colour is spoken of?",
        "options": options,
        "answer_idx": options.index(said.colour),
    }
    return _row(video, [part], subtitles=[line])


def _register_tracks(name: str, style: str) -> None:
    draw: Callable[[np.random.Generator], Row] = partial(draw_tracks, style=style)
    register_drawn(name, draw, "tracking")


_register_tracks("drawn_tracks", "video_point_track_per_frame")
_register_tracks("drawn_ground", "video_point_ground_start_end")
_register_tracks("drawn_single_point_tracks", "video_single_point_track_per_frame")
register_drawn("drawn_video_points", draw_points, "video_pointing")
register_drawn("drawn_video_questions", draw_questions, "video_academic")
register_drawn("drawn_video_captions", draw_captions, "demo")
register_drawn("drawn_speech", draw_speech, "video_academic")
