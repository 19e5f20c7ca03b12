"""Where an object will be, and in which digits a model would write that.

Knows: moments, coordinates in thousandths. Does not know: answers, tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

N_DIGITS = 3  # 1000, of four, is too rare to be foretold
_SPREAD = 15.0
"""Of places around their forecast, in thousandths; half of molmo2-tiny's lie within 10."""


@dataclass(frozen=True)
class Path:
    """One object's last two places: moment in seconds, x and y in thousandths of a side."""

    places: tuple[tuple[float, int, int], ...] = ()

    def on_to(self, time_s: float, x: int, y: int) -> Path:
        return Path((*self.places[-1:], (time_s, x, y)))

    def at(self, time_s: float, axis: int) -> float:
        """The coordinate at a later moment, straight on; it may lie outside the picture."""
        before, last = self.places[0], self.places[-1]
        elapsed_s = last[0] - before[0]
        if elapsed_s <= 0:
            return last[1 + axis]
        speed = (last[1 + axis] - before[1 + axis]) / elapsed_s
        return last[1 + axis] + speed * (time_s - last[0])


class LastDigits:
    """How often coordinates of an answer end in each digit: models have favourites.

    Counted in one answer only: were it over all, the time that an answer takes would tell what
    others were answered.
    """

    def __init__(self) -> None:
        self._counts = [1] * 10

    def count(self, coordinate: int) -> None:
        self._counts[coordinate % 10] += 1

    def write(self, forecast: float, begun: str) -> str:
        """The likeliest digits that start with `begun`, which lacks at least one."""
        width = 10 ** (N_DIGITS - len(begun))
        low = int(begun or "0") * width
        high = low + width - 1
        nearest = min(max(round(forecast), low), high)
        around = range(max(nearest - 9, low), min(nearest + 9, high) + 1)
        return f"{min(around, key=lambda c: self._cost(c, forecast)):0{N_DIGITS}d}"

    def _cost(self, coordinate: int, forecast: float) -> float:
        return abs(coordinate - forecast) - _SPREAD * math.log(self._counts[coordinate % 10])
