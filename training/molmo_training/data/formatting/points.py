"""Rows that ask for points or a count: the question and the answer, in images and in videos.

Fields: `label` (or `question`), `points`: [x, y] each, in a video grouped as {time_s, points}; of
several images `points_by_label`: for each label a list of points for each image.
Knows: which template and sentence a style has. Does not know: tracks, prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from molmo_core.points import PointGroup, render_answer, render_points
from molmo_training.data.formatting.media import RowMedia, scale_of
from molmo_training.data.formatting.row import (
    Row,
    flag,
    invalid,
    items,
    number,
    optional_text,
    rows,
    text,
    xys,
)
from molmo_training.data.formatting.settings import FormatSettings
from molmo_training.data.formatting.templates import fill_template

IMAGE_POINT_GROUPS = {
    "pointing": "pointing",
    "cosyn_point": "pointing",
    "refexp_pointing": "refexp_pointing",
    "point_count": "point_count",
    "point_then_count": "point_count",
    "count_then_point": "count_then_point",
    "count": "only_count",
}
"""The template group of each style about the points of one image."""
MULTI_IMAGE_STYLES = frozenset(
    [
        "multi_image_pointing",
        "multi_image_point_then_count",
        "multi_image_counting",
        "multi_image_count_then_point",
    ]
)
VIDEO_POINT_STYLES = frozenset(
    ["video_point", "video_point_count", "video_count", "video_count_point"]
)

_ALL_IMAGES = "all images"
_P_PLAIN_TEMPLATE = 0.5


def image_points(
    row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator
) -> tuple[str, str]:
    style = text(row, "style")
    question = _asked(row, settings, IMAGE_POINT_GROUPS[style], rng, lower=True)
    mode = "pointing" if style == "refexp_pointing" else style
    answer = points_element(row, media, settings, mode=mode)
    return question, answer


def points_element(row: Row, media: RowMedia, settings: FormatSettings, *, mode: str | None) -> str:
    """The answer that `points` of one image give in a mode; None: the bare element."""
    group = PointGroup(points=xys(row, "points"), scale_xy=scale_of(row, media))
    return _answer(row, [group], _image_label(row), settings, mode)


def multi_image_points(
    row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator
) -> tuple[str, str]:
    """About a drawn label, in all images or a drawn part of them."""
    style, by_label = text(row, "style"), row.get("points_by_label")
    if not (
        isinstance(by_label, Mapping) and by_label and all(isinstance(k, str) for k in by_label)
    ):
        raise invalid(row, "points_by_label", "an object of labels with the points of each image")
    label = sorted(by_label)[int(rng.integers(len(by_label)))]
    of_images: Sequence[object] = items(by_label, label)
    n_images = len(media.images)
    if len(of_images) != n_images:
        raise invalid(row, "points_by_label", f"points for each of the {n_images} images")
    selected, named = _select_images(n_images, settings, rng)
    groups = [
        PointGroup(
            points=xys({"style": style, "points": of_images[image] or []}, "points"),
            media_index=image,
            scale_xy=scale_of(row, media, image),
        )
        for image in selected
    ]
    answer = _answer(row, groups, label.lower(), settings, style)
    if settings.prompt_templates == "none":
        return label.lower(), answer
    is_plain = style == "multi_image_pointing" and named == _ALL_IMAGES
    if is_plain and rng.random() < _P_PLAIN_TEMPLATE:
        return fill_template("pointing", rng, label=label.lower()), answer
    return fill_template(style, rng, label=label.lower(), images=named), answer


def _select_images(
    n_images: int, settings: FormatSettings, rng: np.random.Generator
) -> tuple[list[int], str]:
    """Indices of the images asked about, and how they are named."""
    if n_images < 2 or rng.random() < settings.p_multi_point_all_image:
        return list(range(n_images)), _ALL_IMAGES
    n_selected = int(rng.integers(1, n_images))
    selected = sorted(int(k) for k in rng.choice(n_images, size=n_selected, replace=False))
    return selected, ", ".join(f"image_{k + 1}" for k in selected)


def video_points(
    row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator
) -> tuple[str, str]:
    style = text(row, "style")
    label = optional_text(row, "label") or text(row, "question")
    question = _asked(row, settings, style, rng, lower=False)
    if flag(row, "unanswerable"):
        return question, optional_text(row, "explanation") or f"Sorry, I can't count {label}."
    scale_xy = scale_of(row, media)
    groups = [
        PointGroup(points=xys(moment, "points"), time_s=number(moment, "time_s"), scale_xy=scale_xy)
        for moment in rows(row, "points")
    ]
    groups.sort(key=lambda group: group.time_s or 0.0)
    return question, _answer(row, groups, label, settings, style)


def _asked(
    row: Row, settings: FormatSettings, group: str, rng: np.random.Generator, *, lower: bool
) -> str:
    """The row's question if it has one; else its label, in a sentence of the group."""
    question, label = optional_text(row, "question"), optional_text(row, "label")
    cased = optional_text(row, "label_cased")
    if settings.prompt_templates == "none":
        return text(row, "question") if label is None else cased or label.lower()
    if question is not None:
        return question
    label = text(row, "label")
    return fill_template(group, rng, label=cased or (label.lower() if lower else label))


def _image_label(row: Row) -> str:
    label = optional_text(row, "label")
    return text(row, "question") if label is None else label.lower()


def _answer(
    row: Row, groups: Sequence[PointGroup], label: str, settings: FormatSettings, mode: str | None
) -> str:
    try:
        tag = render_points(
            groups,
            label,
            alt=optional_text(row, "alt"),
            tag_format=settings.pointing_format,
            clip=flag(row, "clip_points"),
        )
    except ValueError as error:
        raise invalid(row, "points", f"points inside their scale ({error})") from error
    return render_answer(mode, tag=tag, n_points=sum(len(group.points) for group in groups))
