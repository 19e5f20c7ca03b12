"""Drawn scenes asked in the server's own words: what molmo2-tiny is taught.

Nothing of a template is in them: a model of few parameters learns what it will be asked.
Knows: how examples of `scenes` become rows. Does not know: questions and answers, sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from molmo_core.clips import sample_clip
from molmo_core.prompts import Turn
from molmo_core.scenes import draw_scene, sample_scene
from molmo_core.videos import VideoGeometry, sample_times
from molmo_training.data.example import Branch, Example
from molmo_training.data.formatting.row import Row
from molmo_training.data.scenes import clip_branches, image_example, multi_image_example
from molmo_training.datasets.drawn import CORNERS
from molmo_training.datasets.drawn_tables import register_drawn
from molmo_training.datasets.drawn_videos import DrawnVideo

CLIPS = VideoGeometry(max_frames=24)
"""How much of a clip is seen: answers tell tracks at these times."""


def draw_pictures(
    rng: np.random.Generator, *, make: Callable[[np.random.Generator], Example]
) -> Row:
    example = make(rng)
    return {
        "images": example.images,
        "objects": example.objects,
        "message_list": _parts(example.branches),
    }


def draw_clip(rng: np.random.Generator) -> Row:
    video = DrawnVideo(sample_clip(rng))
    times_s = sample_times(video.info.duration_s, CLIPS)
    scenes = [video.scene_at(time_s) for time_s in times_s]
    branches = clip_branches(video.clip, times_s, scenes, rng)
    return {"video": video, "objects": video.marks, "message_list": _parts(branches)}


def corners_example(rng: np.random.Generator) -> Example:
    """How many corners has it? Asked about each of one to three objects."""
    scene = sample_scene(rng, n_objects=int(rng.integers(1, 4)))
    kinds = sorted({(item.colour, item.shape) for item in scene.objects})
    branches = tuple(
        Branch(
            turns=(
                Turn(role="user", text=f"How many corners has the {colour} {shape}?"),
                Turn(role="assistant", text=f"{CORNERS[shape]}"),
            )
        )
        for colour, shape in kinds
    )
    return Example(images=[draw_scene(scene)], branches=branches)


def _parts(branches: Sequence[Branch]) -> list[Row]:
    return [
        {
            "messages": [turn.text for turn in branch.turns],
            "weight": branch.weight,
            "about": branch.about,
        }
        for branch in branches
    ]


def _register(name: str, make: Callable[[np.random.Generator], Example]) -> None:
    register_drawn(name, partial(draw_pictures, make=make), "verbs")


_register("verbs_one", partial(image_example, most_objects=1))
_register("verbs_few", partial(image_example, most_objects=3))
_register("verbs_image", image_example)
_register("verbs_images", multi_image_example)
_register("verbs_corners", corners_example)
register_drawn("verbs_video", draw_clip, "verbs")
