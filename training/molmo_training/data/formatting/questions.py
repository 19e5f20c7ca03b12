"""One question and its answer from a row, by the row's style.

Fields of all styles: `style`, `question`, an explicit `prompt` that wins over every template;
the answer as `answers`, `answer`, `answer_with_points` or `text`. A moment of a video is `time_s`,
a part of it `start_s` and `end_s`.
Knows: what each style asks and where its answer stands. Does not know: prefixes, conversations.
Source: spec of Molmo2's training, sections 2.5 and 2.7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from molmo_training.data.formatting.choices import multiple_choice
from molmo_training.data.formatting.media import RowMedia
from molmo_training.data.formatting.points import (
    IMAGE_POINT_GROUPS,
    MULTI_IMAGE_STYLES,
    VIDEO_POINT_STYLES,
    image_points,
    multi_image_points,
    points_element,
    video_points,
)
from molmo_training.data.formatting.row import (
    Row,
    invalid,
    number,
    optional_text,
    rows,
    text,
    texts,
)
from molmo_training.data.formatting.settings import FormatSettings
from molmo_training.data.formatting.templates import fill_template
from molmo_training.data.formatting.tracks import TRACK_GROUPS, track

Exchange = tuple[str, str]
_Handler = Callable[[Row, RowMedia, FormatSettings, np.random.Generator], Exchange]

_CAPTIONS = frozenset(
    [
        "short_caption",
        "long_caption",
        "long_caption_no_pointing",
        "transcript",
        "video_short_caption",
        "video_long_caption",
        "video_transcript",
        "video_motion_caption",
        "video_object_caption",
    ]
)
_PARTS = frozenset({"video_clip_caption_start_end", "video_clip_transcript_start_end"})
_MOMENTS = frozenset({"video_frame_caption_timestamp"})
_SHORT_ANSWERS = frozenset({"short_answer", "video_short_answer"})
_IN_SECONDS = "_in_seconds"
_REASONED = "_exp"
_POINT_SLOT = "<|POINT|>"


def ask(row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator) -> Exchange:
    """The question and the answer; raises InvalidExample for a row that lacks what they need."""
    question, answer = _handler_of(row)(row, media, settings, rng)
    return optional_text(row, "prompt") or question, answer


def _handler_of(row: Row) -> _Handler:
    style = text(row, "style")
    if not style:
        raise invalid(row, "style", "the name of a style")
    if row.get("options") is not None:
        return lambda row, _, settings, rng: multiple_choice(row, settings, rng)
    if style in TRACK_GROUPS:
        return track
    if style in MULTI_IMAGE_STYLES:
        return multi_image_points
    if style in VIDEO_POINT_STYLES:
        return video_points
    if style in IMAGE_POINT_GROUPS:
        return image_points
    return _plain


def _plain(
    row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator
) -> Exchange:
    return _question(row, settings, rng), _answer(row, media, settings, rng)


def _question(row: Row, settings: FormatSettings, rng: np.random.Generator) -> str:
    style, question = text(row, "style"), optional_text(row, "question")
    base = style.removesuffix(_IN_SECONDS)
    if base in _PARTS or base in _MOMENTS:
        return question or _moment_question(row, base, settings, rng)
    if settings.prompt_templates == "none":
        return question or ""
    if style in _CAPTIONS:
        slots = {"object": text(row, "object")} if style == "video_object_caption" else {}
        return question or fill_template(style, rng, **slots)
    if style in _SHORT_ANSWERS:
        return fill_template(style, rng, question=text(row, "question"))
    if style.endswith(_REASONED):
        return fill_template("chain_of_thought", rng, question=text(row, "question"))
    return question or ""


def _moment_question(
    row: Row, base: str, settings: FormatSettings, rng: np.random.Generator
) -> str:
    if base in _PARTS:
        times = {"start": number(row, "start_s"), "end": number(row, "end_s")}
        if not 0 <= times["start"] < times["end"]:
            raise invalid(row, "end_s", "a part with 0 ≤ start_s < end_s")
    else:
        times = {"time": number(row, "time_s")}
        if times["time"] < 0:
            raise invalid(row, "time_s", "seconds from 0")
    if settings.prompt_templates == "none":
        return "-".join(f"{time_s:.2f}" for time_s in times.values())
    mode = settings.timestamp_mode
    is_seconds = mode == "seconds" or text(row, "style").endswith(_IN_SECONDS)
    if mode == "50-percent-seconds" and not is_seconds:
        is_seconds = bool(rng.random() < 0.5)
    if is_seconds:
        written = {name: seconds_text(time_s) for name, time_s in times.items()}
        return fill_template(base + _IN_SECONDS, rng, **written)
    written = {name: clock_text(time_s) for name, time_s in times.items()}
    return fill_template(base, rng, **written)


def seconds_text(time_s: float) -> str:
    return str(round(time_s, 1))


def clock_text(time_s: float) -> str:
    """HH:MM:SS.s; the tenth is rounded before it is split, so that 59.96 s is a minute."""
    tenths = round(time_s * 10)
    minutes, tenths = divmod(tenths, 600)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{tenths // 10:02d}.{tenths % 10}"


def _answer(row: Row, media: RowMedia, settings: FormatSettings, rng: np.random.Generator) -> str:
    if isinstance(row.get("answers"), str):
        return text(row, "answers")
    if row.get("answers") is not None:
        return _most_frequent(row, settings, rng)
    answer = optional_text(row, "answer")
    if answer is not None:
        if row.get("answer_annotations") is not None:
            return _with_points(row, answer, media, settings)
        explanation = optional_text(row, "explanation")
        if explanation is not None and text(row, "style").endswith(_REASONED):
            return f"{explanation} Answer: {answer}"
        return answer
    found = optional_text(row, "answer_with_points")
    if found is None:
        found = optional_text(row, "text")
    if found is None:
        raise invalid(row, "answer", "answer, answers, answer_with_points or text")
    return found


def _most_frequent(row: Row, settings: FormatSettings, rng: np.random.Generator) -> str:
    counts = Counter(texts(row, "answers"))
    if not counts:
        raise invalid(row, "answers", "at least one answer")
    most = max(counts.values())
    best = [answer for answer, n in counts.items() if n == most]
    return best[int(rng.integers(len(best)))] if settings.is_training else best[0]


def _with_points(row: Row, answer: str, media: RowMedia, settings: FormatSettings) -> str:
    """Put the element of each annotation where the answer has its mark."""
    annotations = rows(row, "answer_annotations")
    pieces = answer.split(_POINT_SLOT)
    if len(pieces) != len(annotations) + 1:
        raise invalid(row, "answer_annotations", f"one for each {_POINT_SLOT} of the answer")
    written = pieces[0]
    for annotation, piece in zip(annotations, pieces[1:], strict=True):
        written += points_element(annotation, media, settings, mode=None) + piece
    return written
