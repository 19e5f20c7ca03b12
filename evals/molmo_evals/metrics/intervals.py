"""95 % confidence intervals: Wilson for shares, percentile bootstrap over samples for the rest.

Knows: statistics. Does not know: tasks. Sources: Wilson 1927; Efron's percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution
_N_RESAMPLES = 1000
_SEED = 1  # the same table for the same log

Interval = tuple[float, float]


def wilson(n_successes: int, n: int) -> Interval:
    """Bounds of a share; (0, 1) without samples."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = n_successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Bounds of `statistic` under resampling of rows.

    `rows` is (n, ...); `statistic` maps the weighted sums (resamples, ...) of rows to (resamples,)
    values, so that only statistics of sums can be asked for. (0, 1) without samples.
    """
    n = len(rows)
    if n == 0:
        return 0.0, 1.0
    weights = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=_N_RESAMPLES)
    values = statistic(np.tensordot(weights, rows, axes=1))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
