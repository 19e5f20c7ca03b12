"""PixMo: captions, points, counts, questions about pictures from the web.

The tables are those that `save_to_disk` wrote, with a picture's file in `image`; files lie in
`pixmo_images`, named by the SHA-256 of their URL, wherever the table was made.
Knows: the columns of these tables. Does not know: templates, sampling.
Source: spec of Molmo2's training, section 8.3.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.files import (
    Read,
    RecordRows,
    listed,
    need,
    pictures_folder,
    saved_table,
)
from molmo_training.datasets.registry import dataset
from molmo_training.datasets.tables import ChosenRows, MappedRows, RepeatedRows

LICENCE = "ODC-BY-1.0; pictures: each its own"
MOST_POINTS = 60
"""Of a label, and of an example: with more, other labels of the picture are another example."""


def _steps(repo: str, folder: str) -> str:
    return (
        f"Load {repo} with Hugging Face's datasets, save each picture of `image_url` as "
        "{root}/torch_datasets/pixmo_images/<SHA-256 of the URL>, set its path as `image`, leave "
        "out rows whose picture is gone, and save_to_disk train and validation to "
        f"{{root}}/torch_datasets/pixmo_datasets/{folder}."
    )


def pixmo_image(root: Path, path: str) -> Path:
    """A picture by its own name, wherever the folder was when the table was written."""
    folder = os.environ.get("PIXMO_IMAGE_DIR")
    images = Path(folder) if folder else pictures_folder(root) / "pixmo_images"
    return images / Path(path).name


def _register(
    name: str,
    repo: str,
    folder: str,
    open_rows: Callable[[Path, RowTable], RowTable],
    *groups: str,
    splits: tuple[str, ...] = ("train", "validation"),
    read: Read | None = None,
) -> None:
    @dataset(
        name=name,
        groups=("pixmo", *groups),
        source=f"Hugging Face: {repo}",
        splits=splits,
        licence=LICENCE,
        manual=_steps(repo, folder),
    )
    def _(root: Path, split: str) -> RowTable:
        place = pictures_folder(root) / "pixmo_datasets" / folder
        table = saved_table(place, split, read=read)
        need(pixmo_image(root, "x").parent)
        return open_rows(root, table)


def _mapped(function: Callable[[Path, Row], Row]) -> Callable[[Path, RowTable], RowTable]:
    return lambda root, table: MappedRows(table, partial(function, root))


# --- captions and questions ---------------------------------------------------------------------


def _caption(root: Path, row: Row) -> Row:
    part = {"style": "long_caption", "text": row["caption"]}
    return {"image": pixmo_image(root, row["image"]), **part}


def _caption_and_transcript(root: Path, row: Row) -> Row:
    """The caption and one of the transcripts, as branches."""
    parts: list[Row] = [{"style": "long_caption", "text": row["caption"]}]
    spoken = [{"text": text} for text in row["transcripts"] or ()]
    if spoken:
        parts.append({"style": "transcript", "one_of": spoken})
    return {"image": pixmo_image(root, row["image"]), "message_list": parts}


def _question(root: Path, row: Row) -> Row:
    return {
        "image": pixmo_image(root, row["image"]),
        "style": "user_qa",
        "question": row["question"],
        "answer": row["answer"],
        "guard_counting": True,
    }


def _conversation(root: Path, row: Row) -> Row:
    """The text `[USER] … [ASSISTANT] …` of several turns, or one question, as messages."""
    pieces = row["question"].replace("[ASSISTANT]", "[USER]").split("[USER]")
    messages = [piece.strip() for piece in pieces if piece.strip()]
    return {
        "image": pixmo_image(root, row["image"]),
        "style": "user_qa",
        "messages": [*messages, row["answer"]],
        "guard_counting": True,
    }


def _several_pictures(root: Path, row: Row) -> Row:
    pairs = listed(row["qa_pairs"])
    return {
        "images": [pixmo_image(root, path) for path in row["images"]],
        "style": "correction_qa",
        "guard_counting": True,
        "message_list": [{"question": p["question"], "answer": p["answer"]} for p in pairs],
    }


_register("pixmo_cap", "allenai/pixmo-cap", "cap", _mapped(_caption), "demo")
_register(
    "pixmo_cap_with_transcripts",
    "allenai/pixmo-cap",
    "cap",
    _mapped(_caption_and_transcript),
    "pretrain",
)
_register(
    "pixmo_ask_model_anything",
    "allenai/pixmo-ask-model-anything",
    "ask-model-anything",
    _mapped(_question),
    "demo",
)
_register(
    "pixmo_cap_qa_as_user_qa", "allenai/pixmo-cap-qa", "cap-qa", _mapped(_conversation), "demo"
)


def _of_some_pictures(rows: RecordRows) -> RowTable:
    """Those of two to five pictures."""
    lengths = [len(images) for images in rows.column("images").to_pylist()]
    return ChosenRows(rows, [k for k, n in enumerate(lengths) if 2 <= n <= 5])


_register(
    "pixmo_multi_image_qa_multi_only_max5",
    "allenai/Molmo2-MultiImageQA",
    "pixmo-multi-image-qa",
    _mapped(_several_pictures),
    "demo",
    read=_of_some_pictures,
)


# --- points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointExamples:
    """Pictures with labels and points of each, in examples of at most `MOST_POINTS` points."""

    rows: RecordRows
    parts: Sequence[tuple[int, Sequence[int]]]
    """Of each example the row and the labels."""

    def __len__(self) -> int:
        return len(self.parts)

    def row(self, index: int) -> Row:
        number, labels = self.parts[index]
        row = self.rows.row(number)
        chosen = [{"label": row["label"][k], "points": listed(row["points"][k])} for k in labels]
        return {"image": row["image"], "message_list": chosen}


def _point_examples(rows: RecordRows) -> PointExamples:
    parts: list[tuple[int, list[int]]] = []
    for number, counts in enumerate(_points_by_label(rows.column("points"))):
        parts += [(number, labels) for labels in in_portions(counts, MOST_POINTS)]
    return PointExamples(rows, parts)


def _points_by_label(column: Any) -> list[list[int]]:
    """For each row the number of points of each label; only lengths are read."""
    compute = importlib.import_module("pyarrow.compute")
    counts: list[list[int]] = []
    for chunk in column.chunks:
        points = compute.list_flatten(chunk)
        if points.type.num_fields == 2:  # objects of lists instead of lists of objects
            points = compute.struct_field(points, 0)
        flat = compute.list_value_length(points).to_pylist()
        labels = compute.list_value_length(chunk).to_pylist()
        taken = 0
        for n in labels:
            counts.append([count or 0 for count in flat[taken : taken + (n or 0)]])
            taken += n or 0
    return counts


def in_portions(counts: Sequence[int], most: int) -> list[list[int]]:
    """Labels in their order, as many together as have at most `most` points; those that alone have
    more are left out."""
    portions: list[list[int]] = []
    n_points = most + 1
    for label, count in enumerate(counts):
        if count > most:
            continue
        if n_points + count > most:
            portions.append([])
            n_points = 0
        portions[-1].append(label)
        n_points += count
    return portions


def _in_style(root: Path, scale: Row, style: str, row: Row) -> Row:
    image = {"image": pixmo_image(root, row["image"])}
    if "message_list" in row:
        return {**image, **scale, "style": style, "message_list": row["message_list"]}
    points = {"label": row["label"], "points": listed(row["points"])}
    return {**image, **scale, "style": style, **points}


def _twice(scale: Row, root: Path, table: RowTable) -> RowTable:
    """Each example to be counted, and again to be pointed at."""
    styles = ("point_count", "pointing")
    return RepeatedRows(table, [partial(_in_style, root, scale, style) for style in styles])


_PERCENT = {"point_scale": 100, "clip_points": True}
_PIXELS = {"clip_points": True}

for _name, _folder in (
    ("pixmo_points_train", "points-pointing"),
    ("pixmo_points_high_freq_train", "points-counting"),
):
    _register(
        _name,
        "allenai/pixmo-points",
        _folder,
        partial(_twice, _PERCENT),
        "image_pointing",
        "pretrain",
        read=_point_examples,
    )
_register(
    "pixmo_count_train",
    "allenai/pixmo-count",
    "count",
    partial(_twice, _PIXELS),
    "image_pointing",
    "pretrain",
    splits=("train", "validation", "test"),
)


def _multi_points(root: Path, row: Row) -> Row:
    """The points of each label in each picture; a label that a picture has not is nowhere in it."""
    n_images = len(row["images"])
    by_label: dict[str, list[list[Any]]] = {}
    for k, (labels, points) in enumerate(zip(row["labels"], row["points"], strict=True)):
        pairs = [(labels, points)] if isinstance(labels, str) else zip(labels, points, strict=True)
        for label, its_points in pairs:
            places = by_label.setdefault(label.lower(), [[] for _ in range(n_images)])
            places[k] += listed(its_points)
    styles = ("multi_image_pointing", "multi_image_point_then_count")
    return {
        "images": [pixmo_image(root, path) for path in row["images"]],
        **_PERCENT,
        "points_by_label": by_label,
        "one_of": [{"style": style} for style in styles],
    }


_register(
    "pixmo_multi_points",
    "allenai/molmo2-pixmo-multi-points",
    "pixmo-multi-points",
    _mapped(_multi_points),
    "image_pointing",
)
