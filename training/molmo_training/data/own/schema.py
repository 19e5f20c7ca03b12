"""What a user's row may hold: the fields, their kinds, and the style that follows from them.

A record is checked as far as that can be done without its media, and becomes a row for the
formatter: nulls and `metadata` left out, `style` there. An error names its field in `param`.
Knows: names and kinds of fields. Does not know: files, media, what a style makes of a row
(`formatting`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from molmo_core.errors import InvalidExample
from molmo_core.prompts import NO_PREFIX_STYLES
from molmo_training.data.formatting.formatter import SHARED_FIELDS
from molmo_training.data.formatting.points import (
    IMAGE_POINT_GROUPS,
    MULTI_IMAGE_STYLES,
    VIDEO_POINT_STYLES,
)
from molmo_training.data.formatting.row import Row, shortened
from molmo_training.data.formatting.templates import template_groups
from molmo_training.data.formatting.tracks import TRACK_GROUPS

TEXT, NUMBER, WHOLE, FLAG, LIST, OBJECT, MEDIUM = (
    "a text",
    "a number",
    "a whole number",
    "true or false",
    "a list",
    "an object",
    "a path, or bytes",
)
_HELD: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    NUMBER: (Real,),
    WHOLE: (Integral,),
    FLAG: (bool,),
    LIST: (list, tuple),
    OBJECT: (Mapping,),
    MEDIUM: (str, bytes, Mapping),
}


class Field(NamedTuple):
    """What a field may be; `items` names the fields of the objects in a list."""

    kinds: tuple[str, ...]
    items: str | None = None


Fields = dict[str, Field]


def _of(*kinds: str, items: str | None = None) -> Field:
    return Field(kinds, items)


MEDIA_FIELDS: Fields = {"image": _of(MEDIUM), "images": _of(LIST), "video": _of(MEDIUM)}
QUESTION_FIELDS: Fields = {
    **{
        name: _of(TEXT)
        for name in (
            "style question prompt answer answer_with_points explanation text label label_cased "
            "alt object"
        ).split()
    },
    **{
        name: _of(NUMBER)
        for name in "sampling_fps point_scale width height start_s end_s time_s".split()
    },
    **{
        name: _of(FLAG)
        for name in "count unlabelled_options clip_points unanswerable guard_counting".split()
    },
    "answers": _of(LIST, TEXT),
    "answer_annotations": _of(LIST, items="question"),
    "options": _of(LIST),
    "answer_idx": _of(WHOLE, LIST),
    "points": _of(LIST, items="place"),
    "points_by_label": _of(OBJECT),
    "tracks": _of(LIST, items="moment"),
    "object_id": _of(WHOLE, TEXT),
    "messages": _of(LIST, items="message"),
    "multi_turn_messages": _of(LIST, items="question"),
    "weight": _of(NUMBER, OBJECT),
}
"""Of a question; a row has those of one, or a list of several in `message_list`."""
ROW_FIELDS: Fields = {
    **MEDIA_FIELDS,
    **QUESTION_FIELDS,
    "clip_start_s": _of(NUMBER),
    "clip_end_s": _of(NUMBER),
    "message_list": _of(LIST, items="question"),
    "subtitles": _of(LIST, items="subtitle"),
    "metadata": _of(OBJECT, LIST, TEXT, NUMBER),
}
_OBJECTS: dict[str, Fields] = {
    "question": QUESTION_FIELDS,
    "message": {"role": _of(TEXT), "content": _of(TEXT)},
    "subtitle": {"start_s": _of(NUMBER), "end_s": _of(NUMBER), "text": _of(TEXT)},
    "place": {"x": _of(NUMBER), "y": _of(NUMBER), "time_s": _of(NUMBER), "points": _of(LIST)},
    "moment": {"time_s": _of(NUMBER), "points": _of(LIST, items="sighting")},
    "sighting": {
        "id": _of(WHOLE, TEXT),
        "x": _of(NUMBER),
        "y": _of(NUMBER),
        "occluded": _of(FLAG),
    },
}
"""What the objects in a list may hold."""
_ALSO_OTHER = frozenset({"place", "message"})
"""[x, y] and a text alone."""

KNOWN_STYLES = frozenset(
    {
        *NO_PREFIX_STYLES,
        *IMAGE_POINT_GROUPS,
        *MULTI_IMAGE_STYLES,
        *VIDEO_POINT_STYLES,
        *TRACK_GROUPS,
        *template_groups(),
    }
)
"""Styles with a meaning of their own; any other name is a prefix before the question."""


def read_row(record: object) -> Row:
    """The row that a record is. Raises InvalidExample."""
    if not isinstance(record, Mapping):
        raise InvalidExample(
            f"a row is an object of fields, this is {shortened(record)}: give "
            '{"image": …, "label": …, "points": …} or other fields'
        )
    row = _checked(record, ROW_FIELDS)
    media = [name for name in MEDIA_FIELDS if name in row]
    if len(media) > 1:
        raise InvalidExample(
            f"a row has {' and '.join(media)}: give one of image, images and video", param=media[1]
        )
    if "message_list" in row:
        inner = [_with_style(_listed_by_image(one, row), row) for one in row["message_list"]]
        return {**row, "message_list": inner}
    return _with_style(_listed_by_image(row, row), row)


def obvious_style(question: Row, row: Row) -> str | None:
    """The style that a question without one has; `row` says which media it is about."""
    is_video, is_several = "video" in row, "images" in row
    if "options" in question:
        if is_video:
            return "video_multiple_choice"
        return "multi_image_mc" if is_several else "a_okvqa_mc"
    if "tracks" in question:
        return "video_point_track_per_frame"
    is_counted = bool(question.get("count"))
    if "points_by_label" in question:
        return "multi_image_point_then_count" if is_counted else "multi_image_pointing"
    if "points" in question:
        if is_video:
            return "video_point_count" if is_counted else "video_point"
        return "point_count" if is_counted else "pointing"
    if "messages" in question:
        return "user_qa"
    has_answer = any(f in question for f in ("answer", "answers", "answer_with_points"))
    if has_answer and ("question" in question or "prompt" in question):
        return "user_qa"
    if "text" in question and (is_video or is_several or "image" in row):
        return "video_long_caption" if is_video else "long_caption"
    return None


def questions_of(row: Row) -> Iterator[tuple[str, Row]]:
    """The row's questions with where they stand in it; what the row says for all is in each."""
    shared = {name: row[name] for name in SHARED_FIELDS if name in row}
    for field in ("message_list", "multi_turn_messages"):
        for k, one in enumerate(row.get(field, ())):
            for inside, question in questions_of({**shared, **one}):
                yield f" in {field}[{k}]{inside}", question
    if "message_list" not in row and "multi_turn_messages" not in row:
        yield "", row


def near(name: str, allowed: list[str]) -> str:
    """Names like it, as words of a message; all where none is like it and they are few."""
    found = difflib.get_close_matches(name, allowed, n=3) or (allowed if len(allowed) < 8 else [])
    return f"near are {', '.join(found)}" if found else "see docs/own-data.md for the fields"


def _checked(record: Mapping[Any, Any], fields: Fields, inside: str = "") -> dict[str, Any]:
    """The fields that are not null, each of a known name and of its kind."""
    row: dict[str, Any] = {}
    for name, value in record.items():
        if value is None or (name == "metadata" and not inside):
            continue
        field = fields.get(name)
        if field is None:
            hint = "" if inside else "; what is not for the model goes under metadata"
            raise InvalidExample(
                f"unknown field {str(name)[:80]!r}{inside}; {near(str(name), list(fields))}{hint}",
                param=str(name),
            )
        if field.items:
            value = _transposed(value)
        if not any(_is_of(value, kind) for kind in field.kinds):
            raise InvalidExample(
                f"field {name!r}{inside} is {shortened(value)}; give {' or '.join(field.kinds)}",
                param=name,
            )
        if field.items:
            value = [_item(one, field.items, f"{name}[{k}]{inside}") for k, one in enumerate(value)]
        row[name] = value
    return row


def _item(value: Any, kind: str, name: str) -> Any:
    """An item of a list; an object is checked, a place or text is left to the formatter."""
    if isinstance(value, Mapping):
        return _checked(value, _OBJECTS[kind], f" in {name}")
    if kind not in _ALSO_OTHER:
        raise InvalidExample(
            f"{name} is {shortened(value)}; give an object", param=name.partition("[")[0]
        )
    return value


def _is_of(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == FLAG
    return isinstance(value, _HELD[kind])


def _transposed(value: Any) -> Any:
    """A list of objects that Hugging Face's datasets keep as an object of lists."""
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _listed_by_image(question: Row, row: Row) -> Row:
    """Points of one label in several images as the formatter has them, by label."""
    if "images" not in row or "points" not in question:
        return question
    label, points, n_images = question.get("label"), question["points"], len(row["images"])
    if label is None:
        raise InvalidExample("points without a label; say of what: give label", param="points")
    if len(points) != n_images or not all(p is None or isinstance(p, list | tuple) for p in points):
        raise InvalidExample(
            f"with images, points is a list of points for each image: give {n_images} lists",
            param="points",
        )
    rest = {name: value for name, value in question.items() if name not in ("points", "label")}
    return {**rest, "points_by_label": {label: [list(p or ()) for p in points]}}


def _with_style(question: Row, row: Row) -> Row:
    """The question with its style; those inside a conversation likewise."""
    found = dict(question)
    if "multi_turn_messages" in found:
        outer = {**row, "style": found.get("style") or row.get("style")}
        found["multi_turn_messages"] = [
            _with_style(_listed_by_image(turn, row), outer) for turn in found["multi_turn_messages"]
        ]
        return found
    style, is_counted = found.get("style") or row.get("style"), found.get("count")
    if style is not None and is_counted:
        raise InvalidExample(
            f"count beside the style {style!r}, which says whether to count: leave one out",
            param="count",
        )
    style = style or obvious_style(found, row)
    if style is None:
        raise InvalidExample(
            "a row without a style, and none follows from its fields; give points with a label, "
            "tracks with a label, messages, question and answer, text of a caption, or a style"
        )
    if is_counted and "points" not in found and "points_by_label" not in found:
        raise InvalidExample("count without points: there is nothing to count", param="count")
    found.pop("count", None)
    return {**found, "style": style}
