"""A user's own pictures with points: a JSONL file as an evaluation.

Rows are those that training reads: `image` (a path beside the file), `label`, `points`, and
`point_scale`, or `width` and `height`, where points are not in pixels. Knows: such files. Does not
know: other kinds of rows, requests, scores of other tasks. Source: this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from PIL import ExifTags, Image

from molmo_core import api
from molmo_core.errors import InvalidRequest
from molmo_evals.metrics.points import XY, Tally, match
from molmo_evals.task import Group, Sample, Score, Task
from molmo_evals.tasks.scenes_scoring import f1_score

GROUP = Group(name="points", metric="f1", what="point to all that the label names")
_FIELDS = {"image", "label", "points", "point_scale", "width", "height", "style", "metadata"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PointedPicture:
    """A row: the file, what is looked for, where it is in pixels of (width, height)."""

    path: Path
    label: str
    points_px: tuple[XY, ...]
    size_px: tuple[int, int]


def is_own_file(name: str) -> bool:
    """Whether the name of a task is that of a file of rows."""
    return name.endswith((".jsonl", ".ndjson"))


def own_points(path: Path) -> Task:
    """The rows of a file as a task of one group. Raises InvalidRequest, naming file and line."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as UTF-8 text: {error}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InvalidRequest(f"{path} has no rows; write one JSON object a line")
    return Task(
        # A log goes on with the answers of the same rows only.
        name=f"{path.stem}-{crc32(content):08x}",
        what=f"the {len(rows)} rows of {path.name}",
        groups=(GROUP,),
        samples=lambda seed, n: _samples(rows[:n]),
    )


def _samples(rows: Sequence[PointedPicture]) -> Iterator[Sample]:
    for index, row in enumerate(rows):
        yield Sample(
            key=f"{GROUP.name}/{index:05d}",
            group=GROUP.name,
            verb="point",
            text=row.label,
            media=partial(_file, row.path),
            score=partial(_score, row),
            failed=f1_score(Tally(n_true=len(row.points_px))),
        )


def _file(path: Path) -> list[bytes]:
    return [path.read_bytes()]


def _score(row: PointedPicture, answer: api.PointAnswer) -> Score:
    width_px, height_px = row.size_px
    found = [(point.x * width_px, point.y * height_px) for point in answer.points]
    return f1_score(match(found, row.points_px, row.size_px))


def _row(path: Path, number: int, line: str) -> PointedPicture:
    where = f"{path.name}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON ({error}); write one object a line") from error
    if not isinstance(row, dict) or not _FIELDS.issuperset(row):
        got = sorted(set(row) - _FIELDS) if isinstance(row, dict) else type(row).__name__
        raise InvalidRequest(
            f"{where} has {got}; an evaluation of points reads {', '.join(sorted(_FIELDS))}"
        )
    image, label = row.get("image"), row.get("label")
    if not (isinstance(image, str) and isinstance(label, str)):
        raise InvalidRequest(f"{where} lacks image or label; give both as texts")
    picture = path.parent / image
    size_px = _size_px(picture, where)
    return PointedPicture(
        path=picture, label=label, points_px=_points_px(row, size_px, where), size_px=size_px
    )


def _size_px(picture: Path, where: str) -> tuple[int, int]:
    """Width and height as the picture is shown, from its header."""
    try:
        with Image.open(picture) as image:
            width_px, height_px = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except OSError as error:
        raise InvalidRequest(f"{where}: the picture {picture} cannot be read: {error}") from error
    return (height_px, width_px) if turned else (width_px, height_px)


def _points_px(row: Mapping[str, Any], size_px: tuple[int, int], where: str) -> tuple[XY, ...]:
    across: Any = row.get("width")
    down: Any = row.get("height")
    if (scale := row.get("point_scale")) is not None:
        across = down = scale
    elif across is None and down is None:
        across, down = size_px
    try:
        pairs = [(p["x"], p["y"]) if isinstance(p, dict) else p for p in row["points"]]
        return tuple(
            (float(x) / across * size_px[0], float(y) / down * size_px[1]) for x, y in pairs
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"{where} has the points {str(row.get('points'))[:80]}; give a list of [x, y] or "
            "{x, y}, none being an empty list"
        ) from error
