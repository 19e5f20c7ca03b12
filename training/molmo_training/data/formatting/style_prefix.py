"""What stands before a question: the style of the wanted answer, and its length.

Knows: the modes of the prefix, which styles go by another name outside training. Does not know:
templates, rows. Source: spec of Molmo2's data formatter, system-prompt modes.
"""

from __future__ import annotations

import numpy as np

from molmo_core.prompts import DEMO_STYLES, NO_PREFIX_STYLES
from molmo_training.data.formatting.settings import FormatSettings, SystemPrompt

_NEVER_PREFIXED = frozenset({"demo", "android_control"})
_POINTING = frozenset({"pointing", "point_count", "cosyn_point"})
_COUNT_WITHOUT_POINTING = "_count_without_pointing"
_INFERENCE_NAMES = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
}
_P_STYLE = 0.1
_CHARS_PER_UNIT, _SPREAD_CHARS = 15, 25
_CHARS_PER_UNIT_V3 = 25


def trained_style(style: str, settings: FormatSettings) -> str:
    """The name by which the model knows the style."""
    if not (settings.is_training and settings.keep_count_without_pointing):
        style = style.removesuffix(_COUNT_WITHOUT_POINTING)
    if settings.is_training:
        return style
    if style.startswith("eval_multi_image_"):
        return style.removeprefix("eval_")
    if style.startswith("video_eval_"):
        return style.replace("video_eval_", "video_", 1)
    return _INFERENCE_NAMES.get(style, style)


def style_prefix(
    style: str, *, n_answer_chars: int, settings: FormatSettings, rng: np.random.Generator
) -> str:
    """The prefix of a conversation's first question, "" for none.

    `n_answer_chars` is the length of its last message.
    """
    mode = settings.system_prompt
    if mode == "none":
        return ""
    if mode == "style":
        return f"{style}:"
    if mode == "demo_or_style_v2":
        return "" if style in NO_PREFIX_STYLES else f"{style}:"
    if mode == "demo_or_style":
        bare = style in _NEVER_PREFIXED or (style in DEMO_STYLES and rng.random() >= _P_STYLE)
        return "" if bare else f"{style}:"
    if style in _POINTING and mode != "style_and_length_v3":
        return f"{style}:"
    return _with_length(style, n_answer_chars, mode, rng)


def _with_length(
    style: str, n_answer_chars: int, mode: SystemPrompt, rng: np.random.Generator
) -> str:
    """The length is told of held-out answers too: their loss is that of an answer that is there."""
    if rng.random() < _P_STYLE:
        return f"{style} :" if mode == "style_and_length" else f"{style}:"
    if mode == "style_and_length_v3":
        stretch = float(np.clip(rng.normal(1, 0.05), 0.5, 1.5))
        return f"{style} {int(n_answer_chars * stretch / _CHARS_PER_UNIT_V3)}:"
    return f"{style} {(n_answer_chars + int(rng.normal(0, _SPREAD_CHARS))) // _CHARS_PER_UNIT}:"


def with_prefix(prefix: str, text: str) -> str:
    return f"{prefix} {text}" if prefix and text else prefix or text
