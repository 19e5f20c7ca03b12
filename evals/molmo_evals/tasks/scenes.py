"""Drawn scenes and clips, fresh for every seed, asked about as real files over HTTP.

Pictures are PNG and clips are mp4, sampled with the same functions as for training and with
nothing else changed. Training draws from seeds under 1 000 000 000 (first word of the entropy),
this module from 2 000 000 000 on, so no scene is seen in both.

Knows: what is asked in each group and what a right answer is. Does not know: how requests are
sent, how scores become a table. Source: the acceptance lines of the project.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from molmo_core import api
from molmo_core.clips import Clip, sample_clip, write_clip
from molmo_core.errors import InvalidRequest
from molmo_core.scene_questions import attribute_questions
from molmo_core.scenes import Scene, draw_scene, sample_queries, sample_scene
from molmo_evals.metrics.points import Tally
from molmo_evals.task import Group, Sample, Score, Verb, task
from molmo_evals.tasks import scenes_scoring as scoring

FIRST_ENTROPY = 2_000_000_000
N_SEEDS = 2**31
_MAX_IMAGES = 4

GROUPS = (
    Group(name="image points", metric="f1", what="point to all of a kind", target=0.90),
    Group(name="multi-image points", metric="f1", what="the same in 2-4 pictures", target=0.80),
    Group(name="counting", metric="accuracy", what="the number is right", target=0.80),
    Group(name="none", metric="accuracy", what="says that there are none", target=0.90),
    Group(name="caption", metric="f1", what="objects named in the right place"),
    Group(name="questions", metric="accuracy", what="colour or shape is right"),
    Group(name="video points", metric="f1", what="point in a video"),
    Group(name="tracks", metric="mean_f1", what="F1 per frame, mean over clips", target=0.75),
)


@task("scenes", what="drawn shapes: point, count, describe, track", groups=GROUPS)
def scenes(seed: int, n: int) -> Iterator[Sample]:
    """`n` samples a group; sample i of a group is the same whatever `n` is."""
    if not 0 <= seed < N_SEEDS:
        raise InvalidRequest(f"the seed is {seed}; give one from 0 to {N_SEEDS - 1}")
    for number, group in enumerate(GROUPS):
        for index in range(n):
            entropy = [FIRST_ENTROPY + seed, number, index]
            rng = np.random.default_rng(np.random.SeedSequence(entropy))
            yield _MAKERS[group.name](rng, f"{group.name}/{index:05d}")


def _image_points(rng: np.random.Generator, key: str) -> Sample:
    return _pointing(rng, key, "image points", [_scene(rng)])


def _multi_image_points(rng: np.random.Generator, key: str) -> Sample:
    n_images = int(rng.integers(2, _MAX_IMAGES + 1))
    some = [_scene(rng)] + [sample_scene(rng) for _ in range(n_images - 1)]
    return _pointing(rng, key, "multi-image points", some)


def _pointing(rng: np.random.Generator, key: str, group: str, some: list[Scene]) -> Sample:
    objects = [item for scene in some for item in scene.objects]
    query = sample_queries(rng, objects, 1, negative_rate=0.0)[0]
    return Sample(
        key=key,
        group=group,
        verb="point",
        text=query.label,
        media=partial(_files, some),
        score=lambda answer: scoring.points_score(answer, some, query),
        failed=scoring.f1_score(Tally(n_true=sum(query.matches(item) for item in objects))),
    )


def _counting(rng: np.random.Generator, key: str) -> Sample:
    scene = sample_scene(rng)
    query = sample_queries(rng, scene.objects, 1)[0]
    n_true = sum(query.matches(item) for item in scene.objects)

    def score(answer: api.CountAnswer) -> Score:
        return scoring.right_or_wrong(answer.count == n_true)

    return _about_one(key, "counting", "count", scene, query.label, score)


def _none(rng: np.random.Generator, key: str) -> Sample:
    scene = _scene(rng)
    query = sample_queries(rng, scene.objects, 1, negative_rate=1.0)[0]

    def score(answer: api.PointAnswer) -> Score:
        return scoring.right_or_wrong(answer.status == "none")

    return _about_one(key, "none", "point", scene, query.label, score)


def _caption(rng: np.random.Generator, key: str) -> Sample:
    scene = sample_scene(rng)
    return Sample(
        key=key,
        group="caption",
        verb="caption",
        text="",
        media=partial(_files, [scene]),
        score=lambda answer: scoring.caption_score(answer, scene),
        failed=scoring.f1_score(Tally(n_true=len(scene.objects))),
    )


def _questions(rng: np.random.Generator, key: str) -> Sample:
    asked: Sequence[tuple[str, str]] = ()
    while not asked:
        scene = _scene(rng)
        asked = attribute_questions(scene.objects)
    question, right = asked[int(rng.integers(len(asked)))]

    def score(answer: api.QueryAnswer) -> Score:
        return scoring.right_or_wrong(scoring.same_word(answer.answer, right))

    return _about_one(key, "questions", "query", scene, question, score)


def _video_points(rng: np.random.Generator, key: str) -> Sample:
    return _about_clip(rng, key, "video points")


def _tracks(rng: np.random.Generator, key: str) -> Sample:
    return _about_clip(rng, key, "tracks")


def _about_one(
    key: str,
    group: str,
    verb: Verb,
    scene: Scene,
    text: str,
    score: Callable[..., Score],
) -> Sample:
    return Sample(
        key=key,
        group=group,
        verb=verb,
        text=text,
        media=partial(_files, [scene]),
        score=score,
        failed=scoring.right_or_wrong(False),
    )


def _about_clip(rng: np.random.Generator, key: str, group: str) -> Sample:
    clip = sample_clip(rng)
    query = sample_queries(rng, clip.objects, 1, negative_rate=0.0)[0]
    is_track = group == "tracks"
    n_true = sum(query.matches(item) for item in clip.objects)
    score = scoring.tracks_score if is_track else scoring.video_points_score
    return Sample(
        key=key,
        group=group,
        verb="track" if is_track else "point",
        text=query.label,
        media=partial(_clip_file, clip),
        score=lambda answer: score(answer, clip, query),
        failed=scoring.mean_score(0.0) if is_track else scoring.f1_score(Tally(n_true=n_true)),
    )


_MAKERS: dict[str, Callable[[np.random.Generator, str], Sample]] = {
    "image points": _image_points,
    "multi-image points": _multi_image_points,
    "counting": _counting,
    "none": _none,
    "caption": _caption,
    "questions": _questions,
    "video points": _video_points,
    "tracks": _tracks,
}


def _scene(rng: np.random.Generator) -> Scene:
    """With something to point at: 1-6 objects."""
    return sample_scene(rng, n_objects=int(rng.integers(1, 7)))


def _files(some: Sequence[Scene]) -> list[bytes]:
    files = []
    for scene in some:
        buffer = io.BytesIO()
        Image.fromarray(draw_scene(scene)).save(buffer, format="PNG", compress_level=1)
        files.append(buffer.getvalue())
    return files


def _clip_file(clip: Clip) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(clip, path)
        return [path.read_bytes()]
