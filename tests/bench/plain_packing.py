"""Packing as the specification writes it: a dense table over items, tokens and crops. A yardstick.

Tokens are counted in steps of a five-hundredth of the budget, rounded up; the table is in single
precision; nothing is left out or shared. Knows: the algorithm. Does not know: what production does.
Source: the project's specification of Molmo2's training (`DynamicSolver`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from molmo_training.data.packing import Budgets, Size

CROP_WEIGHT = 30
N_STEPS = 512


def plain_knapsack(
    sizes: Sequence[tuple[int, int]], values: Sequence[float], capacity: tuple[int, int]
) -> list[int]:
    """Indices of the subset of largest value within both capacities."""
    best: NDArray[np.float32] = np.zeros(
        (len(sizes) + 1, capacity[0] + 1, capacity[1] + 1), dtype=np.float32
    )
    for k, ((tokens, crops), value) in enumerate(zip(sizes, values, strict=True)):
        best[k + 1] = best[k]
        if tokens <= capacity[0] and crops <= capacity[1]:
            without = best[k, : capacity[0] + 1 - tokens, : capacity[1] + 1 - crops]
            np.maximum(
                best[k + 1, tokens:, crops:], without + value, out=best[k + 1, tokens:, crops:]
            )
    tokens_left, crops_left = capacity
    chosen = []
    for k in range(len(sizes), 0, -1):
        if best[k, tokens_left, crops_left] != best[k - 1, tokens_left, crops_left]:
            chosen.append(k - 1)
            tokens_left -= sizes[k - 1][0]
            crops_left -= sizes[k - 1][1]
    return chosen[::-1]


def plain_packs(sizes: Sequence[Size], budgets: Budgets, buffer_size: int = 48) -> list[list[Size]]:
    """What is packed of a stream of examples; what waits at its end is left."""
    step = max(1, budgets.n_tokens // N_STEPS)
    capacity = (-(-budgets.n_tokens // step), budgets.n_crops)
    waiting: list[Size] = []
    packs = []
    for size in sizes:
        if -(-size.n_tokens // step) >= capacity[0]:
            packs.append([size])
            continue
        if len(waiting) == buffer_size:
            rounded = [(-(-s.n_tokens // step), s.n_crops) for s in waiting]
            values = [s.n_tokens + CROP_WEIGHT * s.n_crops for s in waiting]
            chosen = plain_knapsack(rounded, values, capacity)
            packs.append([waiting[k] for k in chosen])
            waiting = [s for k, s in enumerate(waiting) if k not in chosen]
        waiting.append(size)
    return packs
