"""How sure the model was of each place, from the log-probabilities of what it wrote there.

The score of a place is a probability: that another place is written here at all (the token in
front of its id), times that x, times that y fall near what was written. Near is 5 % of the side:
digits are one token each, so the alternatives of each digit tell where else the coordinate would
have been. It needs no figures of a model. The confidence is the score put right by two numbers
(`CALIBRATION`), so that of places with confidence 0.8 about 80 % are on an object; the order stays.

Knows: OpenAI's log-probabilities, how a place is written. Does not know: requests, engines.
Source: `docs/confidence.md`, which has the figures.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_core.points import Point
from molmo_core.points.grounding import PER_MILLE

N_ALTERNATIVES = 5
"""So many of each token are asked of the engine; all ten digits change a score by 0.001."""
LEAST_ALTERNATIVES = 3
"""With fewer, scores are on another scale."""
_NEAR = 50
"""Thousandths of the side."""
_LEAST, _MOST = 1e-6, 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """confidence = sigmoid(offset + slope * logit(score)); `source` says what it was fitted to."""

    offset: float
    slope: float
    source: str

    def confidence(self, score: float) -> float:
        inside = min(max(score, _LEAST), _MOST)
        logit = math.log(inside / (1 - inside))
        return round(1 / (1 + math.exp(-self.offset - self.slope * logit)), 4)


CALIBRATION = Calibration(
    offset=1.3405,
    slope=1.2048,
    source="molmo2-tiny@00aedc0e, 4319 points in 2400 drawn scenes, float32 on CPU, "
    "tests/soak/test_confidence.py with seed 21; of other models only the order is known",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    start: int
    text: str
    probability: float
    digits: Mapping[int, float]
    """Probability of each digit in its place; empty for a token that is no single digit."""


class TokenTrail:
    """The tokens of one answer as they come, and the scores of the places in it."""

    def __init__(self) -> None:
        self._tokens: list[_Token] = []
        self._starts: list[int] = []
        self._end = 0

    def feed(self, tokens: Sequence[Mapping[str, Any]]) -> None:
        """`tokens` as in `logprobs.content` of a choice."""
        for token in tokens:
            text = token["token"]
            digits = _digits(token) if _is_digit(text) else {}
            self._starts.append(self._end)
            self._tokens.append(
                _Token(
                    start=self._end,
                    text=text,
                    probability=math.exp(token["logprob"]),
                    digits=digits,
                )
            )
            self._end += len(text)

    def score(self, point: Point) -> float | None:
        """0 to 1; None where the tokens do not tell: too few alternatives, digits in one token
        with others, or a text that its tokens do not add up to."""
        first = bisect_right(self._starts, point.span[0]) - 1
        after = bisect_right(self._starts, point.span[1] - 1)
        written = self._tokens[max(first, 0) : after]
        fields = [point.id, *(round(PER_MILLE * value) for value in (point.x, point.y))]
        texts = [str(fields[0]), *(f"{value:03d}" for value in fields[1:])]
        if first < 1 or "".join(token.text for token in written) != " ".join(texts):
            return None
        y_digits = written[-len(texts[2]) :]
        x_digits = written[-len(texts[2]) - 1 - len(texts[1]) : -len(texts[2]) - 1]
        if not all(len(token.digits) == 10 for token in (*x_digits, *y_digits)):
            return None
        return (
            self._tokens[first - 1].probability
            * _near(fields[1], x_digits)
            * _near(fields[2], y_digits)
        )

    def confidence(self, point: Point) -> float | None:
        score = self.score(point)
        return None if score is None else CALIBRATION.confidence(score)


def _is_digit(text: str) -> bool:
    return len(text) == 1 and text in "0123456789"


def _digits(token: Mapping[str, Any]) -> dict[int, float]:
    """What the alternatives leave is spread over the digits that are not among them."""
    alternatives = token.get("top_logprobs") or ()
    if len(alternatives) < LEAST_ALTERNATIVES:
        return {}
    known = {int(token["token"]): math.exp(token["logprob"])}
    rest = 1.0 - known[int(token["token"])]
    for other in alternatives:
        if other["token"] == token["token"]:
            continue
        probability = math.exp(other["logprob"])
        rest -= probability
        if _is_digit(other["token"]):
            known[int(other["token"])] = probability
    n_others = 10 - len(known)
    return {k: known.get(k, max(rest, 0.0) / max(n_others, 1)) for k in range(10)}


def _near(value: int, digits: Sequence[_Token]) -> float:
    """Probability that the coordinate is within `_NEAR` of `value`, as far as its digits tell.

    Another digit stands for all values that begin so, evenly.
    """
    middle = value + 0.5
    probability, chosen, prefix = 0.0, 1.0, 0
    for token, size in zip(digits, (100, 10, 1), strict=False):
        for digit, share in token.digits.items():
            low = prefix + digit * size
            inside = min(low + size, middle + _NEAR) - max(low, middle - _NEAR)
            if digit != int(token.text) and inside > 0:
                probability += chosen * share * inside / size
        chosen *= token.digits[int(token.text)]
        prefix += int(token.text) * size
    for token in digits[3:]:  # the last digit of 1000
        chosen *= token.probability
    return probability + chosen
