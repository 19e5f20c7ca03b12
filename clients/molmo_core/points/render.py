"""Points and tracks to the text that the model is trained to write.

Knows: numbering, order and rounding inside a tag, and the sentence around it. Does not know:
prompts, or which dataset uses which unit. Source: the training specification, section 4.1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from molmo_core.points.grounding import PER_MILLE, encode_alt, encode_label

TagFormat = Literal["html-v1", "html-v2"]
"""html-v1 (pre-training) parts groups by a tab, html-v2 (everything after) by a semicolon."""

NONE_TEXT = "There are none."
NO_TRACKS_TEXT = "No tracks available."

_GROUP_SEPARATOR: dict[TagFormat, str] = {"html-v1": "\t", "html-v2": ";"}
_TAG_ONLY_MODES = frozenset({"point", "pointing"})
_POINT_THEN_COUNT_MODES = frozenset({"point_count", "point_then_count"})
_COUNT_THEN_POINT_MODES = frozenset({"count_point", "count_then_point"})
_COUNT_MODES = frozenset({"count"})

XY = tuple[float, float]
UNIT_XY: XY = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PointGroup:
    """The points of one image (`media_index`, from 0) or of one moment (`time_s`, seconds).

    `points` are (x, y) in units of `scale_xy`: (1, 1) for normalised, (100, 100) for per cent,
    (width, height) for pixels.
    """

    points: Sequence[XY]
    media_index: int = 0
    time_s: float | None = None
    scale_xy: XY = UNIT_XY


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackFrame:
    """The objects visible at one moment, by any key that is stable over the frames."""

    time_s: float
    points: Mapping[Any, XY]
    scale_xy: XY = UNIT_XY


def render_points(
    groups: Sequence[PointGroup],
    label: str,
    *,
    alt: str | None = None,
    tag_format: TagFormat = "html-v2",
    clip: bool = False,
    lower_label: bool = False,
) -> str:
    """Write one `<points>` tag; "" when no group has a point.

    Inside a group points are sorted by (x, y) after rounding; ids run from 1 over all groups.
    `lower_label` is how image labels are trained. Raises ValueError for a point outside its scale
    unless `clip`.
    """
    fields: list[str] = []
    next_id = 1
    for group in groups:
        per_mille = sorted(_to_per_mille(point, group.scale_xy, clip) for point in group.points)
        if not per_mille:
            continue
        triples = [_triple(next_id + rank, xy) for rank, xy in enumerate(per_mille)]
        next_id += len(triples)
        frame = str(group.media_index + 1) if group.time_s is None else _seconds(group.time_s)
        fields.append(" ".join([frame, *triples]))
    return _tag("points", fields, label.lower() if lower_label else label, alt, tag_format)


def render_tracks(
    frames: Sequence[TrackFrame],
    label: str,
    *,
    alt: str | None = None,
    tag_format: TagFormat = "html-v2",
    clip: bool = False,
) -> str:
    """Write one `<tracks>` tag; "" when no frame has an object.

    Ids count from 1 in order of first appearance (time, then x and y after rounding); inside a
    frame objects are sorted by id. Leave occluded objects out of `points`.
    """
    fields: list[str] = []
    id_of: dict[Hashable, int] = {}
    for frame in sorted(frames, key=lambda frame: frame.time_s):
        placed = [
            (_to_per_mille(xy, frame.scale_xy, clip), key) for key, xy in frame.points.items()
        ]
        if not placed:
            continue
        placed.sort(key=lambda item: item[0])
        for _, key in placed:
            id_of.setdefault(key, len(id_of) + 1)
        placed.sort(key=lambda item: id_of[item[1]])
        triples = [_triple(id_of[key], xy) for xy, key in placed]
        fields.append(" ".join([_seconds(frame.time_s), *triples]))
    return _tag("tracks", fields, label, alt, tag_format)


def render_answer(mode: str | None, *, tag: str, n_points: int, none_text: str = NONE_TEXT) -> str:
    """Put the trained sentence around `tag`.

    `mode` is a training mode, or a style name built from one (`video_point_count`,
    `multi_image_pointing`, `cosyn_point`). Without points every mode answers `none_text`.
    """
    bare_mode = mode
    for prefix in ("video_", "multi_image_", "cosyn_"):
        bare_mode = bare_mode.removeprefix(prefix) if bare_mode else bare_mode
    if bare_mode in _COUNT_MODES or bare_mode == "counting":
        sentence = str(n_points)
    elif bare_mode in _POINT_THEN_COUNT_MODES:
        sentence = f"Counting the {tag} shows a total of {n_points}."
    elif bare_mode in _COUNT_THEN_POINT_MODES:
        sentence = f"There are {n_points} {tag}."
    elif bare_mode is None or bare_mode in _TAG_ONLY_MODES:
        sentence = tag
    else:
        raise ValueError(
            f"unknown answer mode {mode!r}: use point, point_count, count_point or count"
        )
    return sentence if n_points else none_text


def _to_per_mille(point: XY, scale_xy: XY, clip: bool) -> tuple[int, int]:
    # Divided first, as in training: the order decides ties of the rounding.
    x, y = (float(value) / scale for value, scale in zip(point, scale_xy, strict=True))
    if clip:
        x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
    if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):
        raise ValueError(
            f"point {point} lies outside 0..{scale_xy}: correct it, or render with clip=True"
        )
    return round(PER_MILLE * x), round(PER_MILLE * y)


def _triple(object_id: int, xy: tuple[int, int]) -> str:
    return f"{object_id} {xy[0]:03d} {xy[1]:03d}"


def _seconds(time_s: float) -> str:
    if not 0.0 <= time_s < float("inf"):
        raise ValueError(f"time {time_s} s is not a moment of a video: use seconds from 0")
    return f"{time_s:.1f}"


def _tag(name: str, fields: list[str], label: str, alt: str | None, tag_format: TagFormat) -> str:
    if not fields:
        return ""
    alt_attribute = "" if alt is None else f' alt="{encode_alt(alt)}"'
    coords = _GROUP_SEPARATOR[tag_format].join(fields)
    return f'<{name}{alt_attribute} coords="{coords}">{encode_label(label)}</{name}>'
