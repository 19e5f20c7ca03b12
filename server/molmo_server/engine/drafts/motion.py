"""Where an object will be, and in which digits a model would write that.

Knows: moments, coordinates in thousandths. Does not know: answers, tokens.
"""

from __future__ import annotations

import math

LARGEST = 999  # 1000, of four digits, is too rare to be foreseen
_SPREAD = 15.0
"""Of places around their forecast, in thousandths: about the median distance."""
_FADING = 0.995


class Path:
    """One object's last two places; `x, y` in thousandths of a side."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int, int]] = []

    def see(self, time_s: float, x: int, y: int) -> None:
        self._seen = [*self._seen[-1:], (time_s, x, y)]

    def at(self, time_s: float, axis: int) -> float:
        """The coordinate at a later moment, straight on; it may lie outside the picture."""
        last, before = self._seen[-1], self._seen[0]
        elapsed_s = last[0] - before[0]
        if elapsed_s <= 0:
            return last[1 + axis]
        speed = (last[1 + axis] - before[1 + axis]) / elapsed_s
        return last[1 + axis] + speed * (time_s - last[0])


class LastDigits:
    """How often coordinates end in each digit: models have favourites."""

    def __init__(self) -> None:
        self._counts = [1.0] * 10
        self._costs = [0.0] * 10

    def count(self, coordinate: int) -> None:
        self._counts = [count * _FADING for count in self._counts]
        self._counts[coordinate % 10] += 1
        total = sum(self._counts)
        self._costs = [-_SPREAD * math.log(count / total) for count in self._counts]

    def write(self, forecast: float, begun: str) -> str:
        """The likeliest three digits that start with `begun` (at most two of them)."""
        width = 10 ** (3 - len(begun))
        low = int(begun or 0) * width
        high = low + width - 1
        nearest = min(max(round(forecast), low), high)
        around = range(max(nearest - 9, low), min(nearest + 9, high) + 1)
        best = min(around, key=lambda v: abs(v - forecast) + self._costs[v % 10])
        return f"{best:03d}"
