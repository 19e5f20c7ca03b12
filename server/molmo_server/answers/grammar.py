"""The form of an answer that points, and the grammar that it is decoded under.

Knows: which places an answer may have, how large a grammar may become. Does not know: the grammars
(`molmo_core.points`), engines.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from molmo_core.errors import InvalidRequest
from molmo_core.points.grammar import MAX_OBJECTS, frame_texts, points_grammar, tracks_grammar
from molmo_server.media.gate import CheckedVideo
from molmo_server.prompt import Prompt

AnswerForm = Literal["point", "count", "track"]

_TOKENS_OF_POINT = 8
"""At least: an id and six digits, with what parts them."""
_LEAST_POINTS, _MOST_POINTS = 32, 512
_MOST_PAIRS = 2048
"""Of a group and an id: beyond, the order of a video's moments is left to the model. With a
vocabulary of 151 000 tokens 3072 pairs took 0.4 s to compile, 8192 pairs 6 s, any order 0.04 s."""
_SAME_RATE = 1.01


@dataclass(frozen=True, kw_only=True)
class AnswerShape:
    """`max_points`: of tracks so many tracks. `frame_rate`: moments a second. `after_s`: only
    moments behind this one."""

    form: AnswerForm
    max_points: int | None = None
    frame_rate: float | None = None
    after_s: float | None = None

    def moments_s(self, video: CheckedVideo) -> tuple[float, ...]:
        """Those of the video's frames that the answer is about, as the model is told them.

        Raises InvalidRequest when there are none, or fewer a second than `frame_rate`.
        """
        times_s = video.frame_times_s
        if self.frame_rate is not None:
            times_s = _at_rate(times_s, self.frame_rate)
        if self.after_s is None:
            return times_s
        after_s = self.after_s - video.start_s
        later = tuple(t for t in times_s if round(t, 1) > round(after_s, 1))
        if not later:
            raise InvalidRequest(
                f"got a point at {self.after_s:g} s, and the last frame that is looked at is at "
                f"{video.file_times_s[-1]:.1f} s; give points of earlier moments",
                param="points",
            )
        return later


def _at_rate(times_s: tuple[float, ...], rate: float) -> tuple[float, ...]:
    """The sampled frames nearest to every 1/rate seconds."""
    last_s = times_s[-1]
    sampled_rate = (len(times_s) - 1) / last_s if last_s else rate
    if rate > _SAME_RATE * sampled_rate:
        raise InvalidRequest(
            f"got frame_rate {rate:g}, and {sampled_rate:g} frames a second of this video are "
            "looked at; ask for at most so many",
            param="frame_rate",
        )
    return tuple(dict.fromkeys(_nearest(times_s, k / rate) for k in range(int(last_s * rate) + 1)))


def _nearest(times_s: tuple[float, ...], time_s: float) -> float:
    after = bisect_left(times_s, time_s)
    return min(times_s[max(after - 1, 0) : after + 1], key=lambda t: abs(t - time_s))


def answer_grammar(shape: AnswerShape, prompt: Prompt, budget: int) -> str:
    """`budget`: tokens that the answer may have; no more points are allowed than fit into it.

    Unless the shape says how many, sizes are powers of two, so that few different grammars are in
    use about images. Raises InvalidRequest, see `AnswerShape.moments_s`.
    """
    video = prompt.media.video
    times_s = shape.moments_s(video) if video else ()
    if shape.form == "track":
        max_objects = min(shape.max_points or MAX_OBJECTS, MAX_OBJECTS)
        return tracks_grammar(times_s or (0.0,), max_objects=max_objects)
    n_groups = len(frame_texts(times_s)) if times_s else max(len(prompt.media.images), 1)
    most = min(max(budget // _TOKENS_OF_POINT, _LEAST_POINTS), _MOST_POINTS)
    max_points = min(shape.max_points or most, 1 << (most.bit_length() - 1))
    return points_grammar(
        n_media=n_groups,
        times_s=times_s,
        max_points=max_points,
        is_ordered=n_groups * max_points <= _MOST_PAIRS,
        is_counted=shape.form == "count",
    )
