"""Points against points: one-to-one matching, and what precision, recall and F1 make of it.

A hit is a pair nearer than a share of the picture's diagonal; pairs are chosen so that hits are
most, then distances least. Knows: pixels. Does not know: answers, tasks. Source: the acceptance
lines of the project (5 % of the diagonal); the assignment is SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

HIT_SHARE_OF_DIAGONAL = 0.05

XY = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Counts that add up over samples (micro average)."""

    n_hits: int = 0
    n_predicted: int = 0
    n_true: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            n_hits=self.n_hits + other.n_hits,
            n_predicted=self.n_predicted + other.n_predicted,
            n_true=self.n_true + other.n_true,
        )

    @property
    def precision(self) -> float:
        return self.n_hits / self.n_predicted if self.n_predicted else float(self.n_true == 0)

    @property
    def recall(self) -> float:
        return self.n_hits / self.n_true if self.n_true else float(self.n_predicted == 0)

    @property
    def f1(self) -> float:
        """1.0 when there was nothing to find and nothing was found."""
        n_both = self.n_predicted + self.n_true
        return 2 * self.n_hits / n_both if n_both else 1.0


def total(tallies: Iterable[Tally]) -> Tally:
    return sum(tallies, Tally())


def match(predicted_px: Sequence[XY], true_px: Sequence[XY], size_px: tuple[int, int]) -> Tally:
    """Match points of one picture of `size_px` (width, height)."""
    hits = 0
    if predicted_px and true_px:
        limit_px = HIT_SHARE_OF_DIAGONAL * math.hypot(*size_px)
        differences = np.asarray(predicted_px)[:, None, :] - np.asarray(true_px)[None, :, :]
        hits = count_hits(np.linalg.norm(differences, axis=2) / limit_px)
    return Tally(n_hits=hits, n_predicted=len(predicted_px), n_true=len(true_px))


def count_hits(distances: np.ndarray) -> int:
    """Most pairs of rows and columns whose distance, in units of the limit, is at most 1."""
    if not np.isfinite(distances).all():
        raise ValueError("distances must be finite; a prediction is NaN or infinite")
    # A miss costs more than all distances of hits together, so hits are never traded for nearness.
    miss = float(min(distances.shape) + 1)
    costs = np.where(distances <= 1.0, distances, miss)
    rows, columns = linear_sum_assignment(costs)
    return int((distances[rows, columns] <= 1.0).sum())
