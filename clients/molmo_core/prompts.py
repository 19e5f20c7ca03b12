"""Prompts as the model was trained: styles, the wording of each verb, the chat layout.

Knows: which styles carry a prefix, where media and subtitles stand, how turns are closed.
Does not know: token ids, pixels, HTTP. `molmo_hf/chat_template.jinja` is the same layout for
engines that render the chat themselves; a test holds the two equal.

Layout: placeholders of all media first (`Image k` in front of each when there are several),
then subtitles, then the turns. Every finished assistant turn ends with the end token *and* the
next user turn starts with it, as in training. Source: spec of Molmo2's data formatter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from molmo_core.points import PointGroup, render_points
from molmo_core.tokens import IMAGE, TURN_END, TURN_START, VIDEO

DEMO_STYLES = frozenset(
    [
        "point_count",
        "pointing",
        "cosyn_point",
        "user_qa",
        "long_caption",
        "short_caption",
        "video_long_caption",
        "video_short_caption",
        "video_point_track_per_frame",
        "video_point_track_start_end",
        "video_single_point_track_start_end",
        "video_transcript",
        "video_clip_caption_start_end",
        "video_clip_caption_start_end_in_seconds",
        "video_clip_transcript_start_end",
        "video_clip_transcript_start_end_in_seconds",
        "video_frame_caption_timestamp",
        "video_frame_caption_timestamp_in_seconds",
        "correction_qa",
        "text_sft",
        "video_point",
        "video_point_count",
        "video_count",
        "video_count_point",
        "multi_image_pointing",
        "multi_image_counting",
        "multi_image_point_then_count",
        "multi_image_count_then_point",
    ]
)
VIDEO_CHOICE_STYLES = frozenset(
    [
        "video_multiple_choice",
        "video_multiple_choice_count_without_pointing",
        "video_multiple_choice_multiple_correct",
        "video_multiple_choice_w_subtitle",
    ]
)
IMAGE_CHOICE_STYLES = frozenset(
    [
        "a_okvqa_mc",
        "ai2_diagram",
        "ai2_diagram_no_letter",
        "science_qa",
        "eval_multiple_choice",
        "multi_image_mc",
        "multi_image_mc_exp",
        "mantis_instruct_mc",
        "eval_multi_image_mc",
    ]
)
# `demo` and `video_point_track_all_frames`: only the released chat template lists them.
NO_PREFIX_STYLES = (
    DEMO_STYLES
    | VIDEO_CHOICE_STYLES
    | IMAGE_CHOICE_STYLES
    | {"demo", "video_point_track_all_frames"}
)


def with_style(text: str, style: str | None) -> str:
    """Put the style's prefix before a first user text; styles without prefix change nothing."""
    if style is None or style in NO_PREFIX_STYLES:
        return text
    return f"{style}: {text}" if text else f"{style}:"


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Subtitle:
    """One line of speech, in seconds from the start of the clip."""

    start_s: float
    end_s: float
    text: str


def render_subtitles(subtitles: Iterable[Subtitle]) -> str:
    """The block that stands between the video and the question."""
    lines = [f"{s.start_s:.1f} - {s.end_s:.1f} {s.text}\n" for s in subtitles]
    return "subtitle\n" + "".join(lines) if lines else ""


def select_subtitles(
    subtitles: Sequence[Subtitle], frame_times_s: Sequence[float], *, within_s: float = 1.0
) -> list[Subtitle]:
    """Keep what overlaps `within_s` seconds around some sampled frame (training's `frame_1`)."""
    return [
        s
        for s in subtitles
        if any(s.start_s <= t + within_s and s.end_s >= t - within_s for t in frame_times_s)
    ]


def fold_system(system: str, user: str) -> str:
    """A system text becomes the opening of the first user text: the model knows no system role."""
    return f"{system}\n{user}" if system and user else system or user


def render_chat(
    turns: Sequence[Turn],
    *,
    n_images: int = 0,
    n_videos: int = 0,
    subtitles: str = "",
    system: str = "",
    open_answer: bool = True,
) -> str:
    """Render a conversation to the text that is tokenized (BOS is added with the tokens).

    `open_answer` appends the opening of the assistant's turn. With the last turn an assistant's
    and `open_answer` False, that turn is left unclosed: its continuation or its loss is wanted.

    Raises ValueError when the turns do not alternate, starting with the user.
    """
    parts = [media_placeholders(n_images, n_videos), subtitles]
    for index, turn in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(
                f"turn {index + 1} has role {turn.role!r}, expected {expected!r}: "
                "user and assistant turns alternate, starting with the user"
            )
        if turn.role == "user":
            text = fold_system(system, turn.text) if index == 0 else turn.text
            parts.append(user_turn(text, is_first=index == 0))
        else:
            is_last = index == len(turns) - 1
            parts.append(turn.text if is_last else turn.text + TURN_END)
    text = "".join(parts)
    if not open_answer and turns and turns[-1].role == "user":
        return text.removesuffix(_ANSWER_OPENING)
    return text


_ANSWER_OPENING = f"{TURN_START}assistant\n"


def user_turn(text: str, *, is_first: bool) -> str:
    """One user turn together with the opening of the answer to it."""
    closing_of_last = "" if is_first else f"{TURN_END}\n"
    return f"{closing_of_last}{TURN_START}user\n{text}{TURN_END}\n{_ANSWER_OPENING}"


def media_placeholders(n_images: int, n_videos: int) -> str:
    images = (
        IMAGE if n_images == 1 else "".join(f"Image {k}{IMAGE}" for k in range(1, n_images + 1))
    )
    return images + VIDEO * n_videos


Verb = Literal["point", "count", "track", "caption", "query"]


def verb_prompt(verb: Verb, text: str = "", *, n_images: int = 0, has_video: bool = False) -> str:
    """The user text of a verb.

    `text` is the object ("the red circle") for point, count and track, the question for query,
    and unused for caption. These five wordings are ours, in the manner of the training
    prompts: one fixed wording a verb, so that answers can be compared.
    """
    if verb == "query":
        return text
    if verb == "caption":
        return f"Describe this {'video' if has_video else 'image'} briefly."
    if verb == "track":
        return f"Track {text} in the video."
    if verb == "point":
        where = " in the video" if has_video else " in all images" if n_images > 1 else ""
        return f"Point to {text}{where}."
    where = "video" if has_video else "images" if n_images > 1 else "image"
    return f"How many {text} are there in the {where}? Point to each one."


TRACK_FPS = 2.0
"""Rate of the answers that most of the training's tracks have."""
_CONTINUED = "video_single_point_track_per_frame"


def track_prompt(
    text: str,
    *,
    frame_rate: float | None = None,
    seen_at: tuple[float, float, float] | None = None,
) -> str:
    """The user text of track when its answer's rate is named, or an object is to be followed on.

    In the words of the training. `seen_at`: (seconds, x, y) of the object, x and y from 0 to 1;
    the answer begins behind that moment.
    """
    if seen_at is None:
        if frame_rate is None:
            return verb_prompt("track", text, has_video=True)
        return f"Track {text} in {frame_rate:g} FPS"
    time_s, x, y = seen_at
    tag = render_points([PointGroup(points=[(x, y)], time_s=time_s)], text)
    return with_style(f"Track {tag} in {frame_rate or TRACK_FPS:g} FPS.", _CONTINUED)
