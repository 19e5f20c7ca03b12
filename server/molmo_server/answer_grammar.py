"""The grammar that an answer is decoded under, from its form, its media and its budget.

Knows: how large a grammar may become. Does not know: the grammars (`molmo_core.points`), engines.
"""

from __future__ import annotations

from typing import Literal

from molmo_core.points.grammar import frame_texts, points_grammar, tracks_grammar
from molmo_server.prompt import Prompt

AnswerForm = Literal["point", "count", "track"]

_TOKENS_OF_POINT = 8
"""At least: an id and six digits, with what parts them."""
_LEAST_POINTS, _MOST_POINTS = 32, 512
_MOST_RULES = 8192
"""Pairs of a moment and an id; beyond, fewer points are allowed in an answer about a video."""


def answer_grammar(form: AnswerForm, prompt: Prompt, budget: int) -> str:
    """`budget`: tokens that the answer may have; no more points are allowed than fit into it.

    Sizes are powers of two, so that few different grammars are in use about images.
    """
    video = prompt.media.video
    if form == "track":
        return tracks_grammar(video.frame_times_s if video else (0.0,))
    times_s = video.frame_times_s if video else ()
    n_groups = len(frame_texts(times_s)) if times_s else max(len(prompt.media.images), 1)
    most = min(
        max(budget // _TOKENS_OF_POINT, _LEAST_POINTS), _MOST_POINTS, _MOST_RULES // n_groups
    )
    return points_grammar(
        n_media=n_groups,
        times_s=times_s,
        max_points=1 << (max(most, 1).bit_length() - 1),
        is_counted=form == "count",
    )
