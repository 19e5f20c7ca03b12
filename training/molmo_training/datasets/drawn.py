"""Drawn scenes as rows of datasets: pictures, several pictures, and texts about them.

The wordings of the server's verbs are asked beside the templates. Rows bring `objects` and say what
they are `about`, for training from nothing.
Knows: which questions have which answers. Does not know: prompts' templates, tokens, videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molmo_core.points import PointGroup, render_answer, render_points
from molmo_core.prompts import Verb, verb_prompt
from molmo_core.scene_questions import attribute_questions
from molmo_core.scenes import (
    COLOURS,
    SHAPES,
    Query,
    Scene,
    SceneObject,
    describe,
    draw_scene,
    grid_place,
    sample_queries,
    sample_scene,
)
from molmo_training.data.formatting.row import Row
from molmo_training.data.scenes import marks_of, spoken
from molmo_training.datasets.drawn_tables import register_drawn

VERB_RATE = 0.6
CORNERS = {"circle": 0, "triangle": 3, "square": 4, "star": 10}


@dataclass(frozen=True)
class DrawnPicture:
    """The picture of a scene, drawn when it is opened."""

    scene: Scene

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.scene.height_px, self.scene.width_px, 3

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return draw_scene(self.scene)


def pictured(scenes: Sequence[Scene], parts: Sequence[Row], **fields: Any) -> Row:
    """A row about pictures of scenes."""
    pictures = [DrawnPicture(scene) for scene in scenes]
    media = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return {**media, **fields, "objects": marks_of(scenes), "message_list": list(parts)}


def as_asked(verb: Verb, query: Query, **where: Any) -> dict[str, Any]:
    """The server's own wording most of the time, else a template's."""
    prompt = verb_prompt(verb, query.label, **where)
    return {"one_of": [{"prompt": prompt}, {}], "rates": [VERB_RATE, 1 - VERB_RATE]}


def _matching(query: Query, scenes: Sequence[Scene]) -> list[int]:
    objects = [item for scene in scenes for item in scene.objects]
    return [number for number, item in enumerate(objects) if query.matches(item)]


def _points(query: Query, scene: Scene) -> list[list[float]]:
    return [[item.x_px, item.y_px] for item in scene.objects if query.matches(item)]


def _point_part(style: str, query: Query, scene: Scene) -> Row:
    part: dict[str, Any] = {
        "style": style,
        "label": spoken(query.label),
        "points": _points(query, scene),
        "clip_points": True,
        "about": _matching(query, [scene]),
    }
    if style in ("pointing", "point_count"):
        part |= as_asked("point" if style == "pointing" else "count", query)
    return part


def _scene(rng: np.random.Generator, most_objects: int | None) -> Scene:
    n = None if most_objects is None else int(rng.integers(1, most_objects + 1))
    return sample_scene(rng, n_objects=n)


def draw_points(
    rng: np.random.Generator,
    *,
    styles: tuple[str, ...],
    rates: tuple[float, ...],
    n_parts: int = 4,
    most_objects: int | None = None,
) -> Row:
    scene = _scene(rng, most_objects)
    queries = sample_queries(rng, scene.objects, n_parts)
    drawn = rng.choice(len(styles), size=n_parts, p=rates)
    parts = [_point_part(styles[k], q, scene) for k, q in zip(drawn, queries, strict=True)]
    return pictured([scene], parts)


_MULTI_STYLES = (
    "multi_image_pointing",
    "multi_image_point_then_count",
    "multi_image_counting",
    "multi_image_count_then_point",
)


def draw_multi_points(rng: np.random.Generator) -> Row:
    """Two to four pictures; labels about all or some of them, or the server's question."""
    scenes = [sample_scene(rng) for _ in range(int(rng.integers(2, 5)))]
    objects = [item for scene in scenes for item in scene.objects]
    parts: list[Row] = []
    for query in sample_queries(rng, objects, 3):
        if rng.random() < VERB_RATE:
            parts.append(_asked_of_all(query, scenes, "point" if rng.random() < 0.7 else "count"))
            continue
        by_label = {spoken(query.label): [_points(query, scene) for scene in scenes]}
        style = _MULTI_STYLES[int(rng.choice(4, p=(0.55, 0.25, 0.1, 0.1)))]
        parts.append({"style": style, "points_by_label": by_label, "clip_points": True})
    return pictured(scenes, parts)


def _asked_of_all(query: Query, scenes: Sequence[Scene], verb: Verb) -> Row:
    """In the server's words, which are about all pictures."""
    groups = [
        PointGroup(
            points=[(x, y) for x, y in _points(query, scene)],
            media_index=index,
            scale_xy=(scene.width_px, scene.height_px),
        )
        for index, scene in enumerate(scenes)
    ]
    tag = render_points(groups, spoken(query.label), clip=True)
    mode = "pointing" if verb == "point" else "point_count"
    answer = render_answer(mode, tag=tag, n_points=sum(len(group.points) for group in groups))
    question = verb_prompt(verb, query.label, n_images=len(scenes))
    return {"messages": [question, answer], "about": _matching(query, scenes)}


def draw_captions(rng: np.random.Generator) -> Row:
    """A caption, and the same told by someone in passing."""
    scene = sample_scene(rng)
    caption, prompt = describe(scene), verb_prompt("caption")
    asked = {"one_of": [{"prompt": prompt}, {}], "rates": [VERB_RATE, 1 - VERB_RATE]}
    parts: list[Row] = [{"style": "long_caption", "text": caption, **asked}]
    parts.append({"style": "transcript", "text": _transcript(scene)})
    return pictured([scene], parts, weight=0.5)


def _transcript(scene: Scene) -> str:
    seen = [f"{item.colour} {item.shape}" for item in scene.objects]
    if not seen:
        return "I see nothing here."
    return f"I see {len(seen)} in here: {' and '.join(f'a {name}' for name in seen)}."


def draw_questions(rng: np.random.Generator) -> Row:
    """Short answers and multiple choice about shapes, colours, counts and places."""
    scene = sample_scene(rng, n_objects=int(rng.integers(1, 7)))
    asked = [*attribute_questions(scene.objects), *_place_questions(scene), *_counts(rng, scene)]
    chosen = rng.permutation(len(asked))[:4]
    parts: list[Row] = []
    for question, answer in (asked[int(k)] for k in chosen):
        options = options_for(answer, rng)
        if options and rng.random() < 0.4:
            part = {"style": "a_okvqa_mc", "options": options, "answer_idx": options.index(answer)}
        else:
            part = {"style": "vqa2", "answers": [answer] * 3}
            if rng.random() < 0.5:
                part = {"style": "user_qa", "answer": answer}
        parts.append({"question": question, **part})
    return pictured([scene], parts)


def _place_questions(scene: Scene) -> list[tuple[str, str]]:
    kinds = [(item.colour, item.shape) for item in scene.objects]
    return [
        (f"Where is the {item.colour} {item.shape}?", _place_of(item, scene))
        for item in scene.objects
        if kinds.count((item.colour, item.shape)) == 1
    ]


def _place_of(item: SceneObject, scene: Scene) -> str:
    return grid_place(item.x_px / scene.width_px, item.y_px / scene.height_px)


def _counts(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    queries = sample_queries(rng, scene.objects, 2)
    return [
        (f"How many {spoken(q.label).removesuffix('s')}s are there?", f"{len(_points(q, scene))}")
        for q in queries
    ]


def options_for(answer: str, rng: np.random.Generator) -> list[str]:
    """Options among which the answer is, of its own kind; none for answers of no kind."""
    numbers = tuple(str(n) for n in range(8))
    for kind in (tuple(SHAPES), tuple(COLOURS), numbers):
        if answer in kind:
            others = [value for value in kind if value != answer]
            options = [answer, *rng.permutation(others)[:3].tolist()]
            return [str(option) for option in rng.permutation(options)]
    return []


def draw_chat(rng: np.random.Generator) -> Row:
    """A conversation about a picture: pointing, counting and questions in turn."""
    scene = sample_scene(rng, n_objects=int(rng.integers(2, 7)))
    query, other = sample_queries(rng, scene.objects, 2)
    turns: list[Row] = [
        {k: v for k, v in _point_part(style, q, scene).items() if k not in ("one_of", "rates")}
        for style, q in (("pointing", query), ("point_count", other))
    ]
    turns += [
        {"style": "user_qa", "question": question, "answer": answer}
        for question, answer in attribute_questions(scene.objects)[:2]
    ]
    order = rng.permutation(len(turns))
    return pictured([scene], [{"multi_turn_messages": [turns[int(k)] for k in order]}])


def draw_image_questions(rng: np.random.Generator) -> Row:
    """Questions of which the answer is one of several pictures, or in one of them."""
    scenes = [
        sample_scene(rng, n_objects=int(rng.integers(1, 5))) for _ in range(int(rng.integers(2, 5)))
    ]
    objects = [item for scene in scenes for item in scene.objects]
    parts: list[Row] = []
    for query in sample_queries(rng, objects, 2):
        label = spoken(query.label).removesuffix("s")
        k = int(rng.integers(len(scenes)))
        answer = f"{len(_points(query, scenes[k]))}"
        question = f"How many {label}s are there in image {k + 1}?"
        parts.append({"style": "correction_qa", "question": question, "answer": answer})
        has = [k for k, scene in enumerate(scenes) if _points(query, scene)]
        if len(has) == 1:
            names = [f"image {k + 1}" for k in range(len(scenes))]
            choice = {"options": names, "answer_idx": has[0]}
            parts.append(
                {"style": "mantis_instruct_mc", "question": f"Which has a {label}?", **choice}
            )
    return pictured(scenes, parts)


def draw_text(rng: np.random.Generator) -> Row:
    """Questions without a picture, some of them in turn."""
    messages: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        a, b = (int(n) for n in rng.integers(0, 50, size=2))
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        messages += (
            (f"What is {a} + {b}?", f"{a + b}"),
            (f"Which is more, {a} or {b}?", f"{max(a, b)}"),
            (f"How many corners has a {shape}?", f"{CORNERS[shape]}"),
        )[int(rng.integers(3))]
    return {"style": "text_sft", "messages": messages}


_points_of = partial(draw_points, styles=("pointing", "point_count"), rates=(0.6, 0.4))

register_drawn("drawn_points", _points_of, "image_pointing")
register_drawn("drawn_points_one", partial(_points_of, most_objects=1), "image_pointing")
register_drawn("drawn_points_few", partial(_points_of, most_objects=3), "image_pointing")
register_drawn(
    "drawn_count",
    partial(
        draw_points, styles=("point_count", "count_then_point", "count"), rates=(0.5, 0.25, 0.25)
    ),
    "image_pointing",
)
register_drawn("drawn_multi_points", draw_multi_points, "image_pointing")
register_drawn("drawn_captions", draw_captions, "demo")
register_drawn("drawn_questions", draw_questions, "image_academic")
register_drawn("drawn_image_questions", draw_image_questions, "image_academic")
register_drawn("drawn_chat", draw_chat, "demo")
register_drawn("drawn_text", draw_text, "nlp")
