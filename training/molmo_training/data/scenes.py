"""Drawn scenes as training examples: pointing, counting, tracking, captions, questions.

Knows: which questions are asked of a scene and their right answers in Molmo2's formats. Does
not know: tokens, batches. Everything follows from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from molmo_core.clips import Clip, draw_frames, sample_clip
from molmo_core.points import PointGroup, TrackFrame, render_answer, render_points, render_tracks
from molmo_core.prompts import Turn, Verb, verb_prompt
from molmo_core.scene_questions import attribute_questions
from molmo_core.scenes import (
    COLOURS,
    SHAPES,
    Query,
    Scene,
    describe,
    draw_scene,
    sample_queries,
    sample_scene,
)
from molmo_core.videos import VideoGeometry, VideoInfo, sample_times
from molmo_training.data.example import Branch, Example, MarkedObject

_SHAPE_NUMBER = {name: i for i, name in enumerate(SHAPES)}
_COLOUR_NUMBER = {name: i for i, name in enumerate(COLOURS)}

# Other ways in which people ask; the fixed wording of the verb is used most of the time.
_POINT_VARIANTS = ("Point at {x}.", "Find {x}.", "Where is {x}?", "Show me {x}.", "point to {x}")
_COUNT_VARIANTS = ("How many {x} are there?", "Count the {x}.", "How many {x} do you see?")
_CAPTION_VARIANTS = ("Describe this image.", "What is in the image?", "Describe the image.")
_VARIANT_RATE = 0.15


def image_example(
    rng: np.random.Generator, *, n_branches: int = 4, most_objects: int | None = None
) -> Example:
    """One picture with several questions; with `most_objects` it holds 1 to so many objects."""
    n_objects = None if most_objects is None else int(rng.integers(1, most_objects + 1))
    scene = sample_scene(rng, n_objects=n_objects)
    branches = [
        _ask("point" if rng.random() < 0.68 else "count", query, [scene], rng)
        for query in sample_queries(rng, scene.objects, n_branches)
    ]
    if rng.random() < 0.3:
        branches.append(_caption(scene, rng))
    asked = attribute_questions(scene.objects)
    if asked and rng.random() < 0.5:
        question, answer = asked[int(rng.integers(len(asked)))]
        branches.append(_branch(question, answer))
    return Example(images=[draw_scene(scene)], branches=tuple(branches), objects=marks_of([scene]))


def multi_image_example(rng: np.random.Generator, *, n_branches: int = 3) -> Example:
    """Two to four pictures; every question is about all of them."""
    scenes = [sample_scene(rng) for _ in range(int(rng.integers(2, 5)))]
    objects = [o for scene in scenes for o in scene.objects]
    branches = [
        _ask("point" if rng.random() < 0.7 else "count", query, scenes, rng)
        for query in sample_queries(rng, objects, n_branches)
    ]
    return Example(
        images=[draw_scene(s) for s in scenes],
        branches=tuple(branches),
        objects=marks_of(scenes),
    )


def video_example(rng: np.random.Generator, geometry: VideoGeometry) -> Example:
    """One clip, sampled as the server samples it: tracks, and points in the first frame."""
    clip = sample_clip(rng)
    info = clip_info(clip)
    times = sample_times(info.duration_s, geometry)
    shown = [info.frame_times_s[info.frame_at(t)] for t in times]
    scenes = [clip.scene_at(t) for t in shown]
    return Example(
        frames=list(draw_frames(clip, shown)),
        frame_times_s=times,
        branches=clip_branches(clip, times, scenes, rng),
        objects=[marks_of([s])[0] for s in scenes],
    )


def clip_branches(
    clip: Clip, times_s: Sequence[float], scenes: Sequence[Scene], rng: np.random.Generator
) -> tuple[Branch, ...]:
    """Questions about a clip of which these scenes are seen at these times."""
    queries = sample_queries(rng, clip.objects, 3)
    tracks = _track(queries[0], clip, times_s, scenes)
    return (tracks, *(_video_point(query, scenes[0]) for query in queries[1:]))


def clip_info(clip: Clip) -> VideoInfo:
    """What probing the clip's file would say."""
    times = tuple(float(k / clip.frame_rate) for k in range(clip.n_frames))
    return VideoInfo(
        width_px=clip.width_px,
        height_px=clip.height_px,
        fps=clip.fps,
        duration_s=clip.duration_s,
        frame_times_s=times,
        begin_s=0.0,
    )


def _branch(question: str, answer: str, weight: float = 1.0, about: tuple[int, ...] = ()) -> Branch:
    turns = (Turn(role="user", text=question), Turn(role="assistant", text=answer))
    return Branch(turns=turns, weight=weight, about=about)


def _ask(verb: Verb, query: Query, scenes: Sequence[Scene], rng: np.random.Generator) -> Branch:
    groups = [
        PointGroup(
            points=[(o.x_px, o.y_px) for o in scene.objects if query.matches(o)],
            media_index=index,
            scale_xy=(scene.width_px, scene.height_px),
        )
        for index, scene in enumerate(scenes)
    ]
    n_points = sum(len(g.points) for g in groups)
    tag = render_points(groups, spoken(query.label), clip=True)
    mode = "pointing" if verb == "point" else "point_count"
    answer = render_answer(mode, tag=tag, n_points=n_points)
    question = verb_prompt(verb, query.label, n_images=len(scenes))
    if len(scenes) == 1 and rng.random() < _VARIANT_RATE:
        variants = _POINT_VARIANTS if verb == "point" else _COUNT_VARIANTS
        question = variants[int(rng.integers(len(variants)))].format(x=query.label)
    objects = [o for scene in scenes for o in scene.objects]
    about = tuple(number for number, o in enumerate(objects) if query.matches(o))
    return _branch(question, answer, about=about)


def spoken(label: str) -> str:
    """The label as it stands in the answer: without its article."""
    return label.removeprefix("the ")


def _caption(scene: Scene, rng: np.random.Generator) -> Branch:
    question = verb_prompt("caption")
    if rng.random() < _VARIANT_RATE:
        question = _CAPTION_VARIANTS[int(rng.integers(len(_CAPTION_VARIANTS)))]
    return _branch(question, describe(scene), weight=0.5)


def _track(query: Query, clip: Clip, times: Sequence[float], scenes: Sequence[Scene]) -> Branch:
    frames = [
        TrackFrame(
            time_s=time_s,
            points={
                key: (o.x_px, o.y_px) for key, o in enumerate(scene.objects) if query.matches(o)
            },
            scale_xy=(clip.width_px, clip.height_px),
        )
        for time_s, scene in zip(times, scenes, strict=True)
    ]
    tag = render_tracks(frames, spoken(query.label), clip=True)
    answer = tag or render_answer("pointing", tag="", n_points=0)
    return _branch(verb_prompt("track", query.label, has_video=True), answer)


def _video_point(query: Query, first: Scene) -> Branch:
    group = PointGroup(
        points=[(o.x_px, o.y_px) for o in first.objects if query.matches(o)],
        time_s=0.0,
        scale_xy=(first.width_px, first.height_px),
    )
    tag = render_points([group], spoken(query.label), clip=True)
    answer = render_answer("pointing", tag=tag, n_points=len(group.points))
    return _branch(verb_prompt("point", query.label, has_video=True), answer)


def marks_of(scenes: Sequence[Scene]) -> list[list[MarkedObject]]:
    """The objects of each scene, numbered through."""
    numbers = count()
    return [
        [
            MarkedObject(
                x=o.x_px / scene.width_px,
                y=o.y_px / scene.height_px,
                shape=_SHAPE_NUMBER[o.shape],
                colour=_COLOUR_NUMBER[o.colour],
                number=next(numbers),
                radius_xy=(o.radius_px / scene.width_px, o.radius_px / scene.height_px),
            )
            for o in scene.objects
        ]
        for scene in scenes
    ]
