"""Multiple choice: how options are listed, what is asked for, and the answer in that form.

Knows: the fixed layout (letters, one instruction) and the drawn ones. Does not know: prefixes.
A row has `question`, `options`, `answer_idx` (a number from 0, or a list of them) and, where
options must stand without letters, `unlabelled_options`.
Source: spec of Molmo2's training, multiple choice.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np

from molmo_training.data.formatting.row import Row, flag, invalid, items, text, texts
from molmo_training.data.formatting.settings import FormatSettings
from molmo_training.data.formatting.templates import fill_template, load_table

FIXED_INSTRUCTION = "Only return the correct answer option."

MULTIPLE_CORRECT_STYLE = "video_multiple_choice_multiple_correct"

_P_FIXED = 0.1
_P_LABEL_ONLY, _P_LABELLED, _P_INLINE, _P_INSTRUCTED = 0.25, 0.8, 0.1, 0.5
_P_USUAL_MARKER, _P_NOUN_OF_ALPHABET, _P_BULLET = 0.8, 0.6, 0.5
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
_ALPHABETS: tuple[tuple[str, Sequence[str]], ...] = (
    ("letter", string.ascii_uppercase),
    ("letter", string.ascii_lowercase),
    ("number", [str(n) for n in range(1, 21)]),
    ("numeral", _ROMAN),
)
_MOST_OPTIONS = 26


@dataclass(frozen=True, kw_only=True)
class _Choice:
    question: str
    options: tuple[str, ...]
    correct: tuple[int, ...]
    is_unlabelled: bool


def _read_choice(row: Row) -> _Choice:
    options = tuple(texts(row, "options"))
    if not 1 <= len(options) <= _MOST_OPTIONS:
        raise invalid(row, "options", f"1 to {_MOST_OPTIONS} options")
    index = row.get("answer_idx")
    given = [index] if isinstance(index, Integral) else items(row, "answer_idx")
    correct = tuple(int(k) if isinstance(k, Integral) else -1 for k in given)
    if not correct or not all(0 <= k < len(options) for k in correct):
        raise invalid(row, "answer_idx", f"numbers from 0 to {len(options) - 1}")
    return _Choice(
        question=text(row, "question"),
        options=options,
        correct=correct,
        is_unlabelled=flag(row, "unlabelled_options"),
    )


def multiple_choice(
    row: Row, settings: FormatSettings, rng: np.random.Generator
) -> tuple[str, str]:
    """The question with its options, and the answer."""
    choice, templates = _read_choice(row), settings.prompt_templates
    if row.get("style") == MULTIPLE_CORRECT_STYLE and templates != "none":
        options, answer = _list_fixed(choice)
        return _filled(MULTIPLE_CORRECT_STYLE, choice, options, rng), answer
    if len(choice.correct) > 1 or templates == "none":
        return _fixed(choice, settings, rng)
    if templates == "uber_model":
        is_video = str(row.get("style", "")).startswith("video_")
        return _fixed(choice, settings, rng, group="multiple_choice" if is_video else None)
    if not settings.is_training or rng.random() < _P_FIXED:
        options, answer = _list_fixed(choice)
        return f"{choice.question}\n{FIXED_INSTRUCTION}\n{options}", answer
    return _drawn(choice, rng)


def _fixed(
    choice: _Choice,
    settings: FormatSettings,
    rng: np.random.Generator,
    *,
    group: str | None = None,
) -> tuple[str, str]:
    options, answer = _list_fixed(choice)
    is_letter_only = (
        settings.is_training
        and settings.p_choice_content_in_mc < 1
        and rng.random() >= settings.p_choice_content_in_mc
    )
    if is_letter_only and not choice.is_unlabelled:
        answer = "\n".join(string.ascii_uppercase[k] for k in choice.correct)
    if group is None:
        return f"{choice.question}\n{options}", answer
    return _filled(group, choice, options, rng), answer


def _list_fixed(choice: _Choice) -> tuple[str, str]:
    """Options one a line, lettered unless they must not be; the right ones likewise."""
    lines = list(choice.options)
    if not choice.is_unlabelled:
        lines = [f"{string.ascii_uppercase[k]}. {option}" for k, option in enumerate(lines)]
    return "\n".join(lines), "\n".join(lines[k] for k in choice.correct)


def _filled(group: str, choice: _Choice, options: str, rng: np.random.Generator) -> str:
    return fill_template(group, rng, question=choice.question, options=options)


@cache
def _parts() -> dict[str, Any]:
    return load_table("choices")


def _drawn(choice: _Choice, rng: np.random.Generator) -> tuple[str, str]:
    is_label_only = bool(rng.random() < _P_LABEL_ONLY)
    is_blank = not choice.options[choice.correct[0]].strip()
    is_labelled = bool(rng.random() < _P_LABELLED) or is_label_only or is_blank
    noun, marks, answer = _marks(choice, rng, is_labelled, is_label_only)
    listed = [mark + option for mark, option in zip(marks, choice.options, strict=True)]
    is_inline = bool(rng.random() < _P_INLINE)
    options = _separator(listed, rng, is_inline, is_labelled).join(listed)
    parts = _parts()
    kind = "label_only" if is_label_only else "option"
    instruction = ""
    layouts = parts["layouts"][kind]
    if rng.random() < _P_INSTRUCTED:
        sentences = parts["instructions"][kind]
        if is_labelled and not is_label_only:
            sentences = sentences + parts["instructions"]["labelled_option"]
        instruction = _one_of(sentences, rng).format(noun=noun)
        layouts = parts["layouts"]["instructed"]
    question = _one_of(layouts, rng).format(
        question=choice.question, options=options, instruction=instruction, noun=noun
    )
    return question, answer


def _marks(
    choice: _Choice, rng: np.random.Generator, is_labelled: bool, is_label_only: bool
) -> tuple[str, list[str], str]:
    """What a label is called, what stands before each option, and the answer."""
    parts, n_options, right = _parts(), len(choice.options), choice.correct[0]
    if not is_labelled:
        bullet = _one_of(parts["bullets"], rng) if rng.random() < _P_BULLET else ""
        return "option", [bullet] * n_options, choice.options[right]
    is_usual = rng.random() < _P_USUAL_MARKER
    marker = _one_of(parts["markers" if is_usual else "rare_markers"], rng)
    noun, labels = _one_of([pair for pair in _ALPHABETS if len(pair[1]) >= n_options], rng)
    if rng.random() >= _P_NOUN_OF_ALPHABET:
        noun = _one_of(("identifier", "label"), rng)
    marks = [marker % label for label in labels[:n_options]]
    answer = labels[right] if is_label_only else marks[right] + choice.options[right]
    return noun, marks, answer.strip()


def _separator(
    listed: Sequence[str], rng: np.random.Generator, is_inline: bool, is_labelled: bool
) -> str:
    """What parts the options: none that stands in one; nothing but a space only beside labels."""
    if not is_inline:
        return "\n"
    joined = "".join(listed)
    usable = [s for s in _parts()["inline_separators"] if s.strip() and s.strip() not in joined]
    if is_labelled:
        usable.append(" ")
    return _one_of(usable, rng) if usable else "\n"


def _one_of(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]
