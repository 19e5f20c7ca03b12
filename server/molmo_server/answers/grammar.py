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
_MOST_PAIRS = 2048
"""Of a group and an id: beyond, the order of a video's moments is left to the model. With a
vocabulary of 151 000 tokens 3072 pairs took 0.4 s to compile, 8192 pairs 6 s, any order 0.04 s."""


def answer_grammar(form: AnswerForm, prompt: Prompt, budget: int) -> str:
    """`budget`: tokens that the answer may have; no more points are allowed than fit into it.

    Sizes are powers of two, so that few different grammars are in use about images.
    """
    video = prompt.media.video
    if form == "track":
        return tracks_grammar(video.frame_times_s if video else (0.0,))
    times_s = video.frame_times_s if video else ()
    n_groups = len(frame_texts(times_s)) if times_s else max(len(prompt.media.images), 1)
    most = min(max(budget // _TOKENS_OF_POINT, _LEAST_POINTS), _MOST_POINTS)
    max_points = 1 << (most.bit_length() - 1)
    return points_grammar(
        n_media=n_groups,
        times_s=times_s,
        max_points=max_points,
        is_ordered=n_groups * max_points <= _MOST_PAIRS,
        is_counted=form == "count",
    )
