"""Where marked objects fall: in which patches, and in which visual tokens.

Knows: objects by their place, grids of patches, pooling indices. Does not know: pixels, text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from molmo_training.data.example import MarkedObject


def mark_patches(objects: Sequence[MarkedObject], rows: int, cols: int) -> NDArray[np.float32]:
    """For each patch of a rows × cols grid: (present, shape, colour, dx, dy, number, x, y).

    An object is marked at the patch that holds its centre and at those whose centre lies inside
    0.8 of its radius. dx, dy are the offset of its centre from the patch's, in patches; x, y its
    place in the picture, −1…1. Returns (rows · cols, 8).
    """
    grid = np.zeros((rows, cols, 8), dtype=np.float32)
    across, down = np.arange(cols) + 0.5, np.arange(rows) + 0.5
    for mark in objects:
        x, y = mark.x * cols, mark.y * rows
        reach_x, reach_y = (0.8 * max(r, 1e-6) for r in mark.radius_xy)
        far = ((across[None] - x) / (reach_x * cols)) ** 2
        far = far + ((down[:, None] - y) / (reach_y * rows)) ** 2
        covered = far <= 1
        covered[min(int(y), rows - 1), min(int(x), cols - 1)] = True
        row, col = np.nonzero(covered)
        grid[row, col] = (1.0, mark.shape, mark.colour, 0, 0, mark.number, 0, 0)
        grid[row, col, 3], grid[row, col, 4] = x - across[col], y - down[row]
        grid[row, col, 6:8] = 2 * mark.x - 1, 2 * mark.y - 1
    return grid.reshape(rows * cols, 8)


def shown_objects(
    patch_targets: NDArray[np.float32], pooling: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The objects in the patches of each visual token (row of `pooling`), as bits: (M,)."""
    flat = patch_targets.reshape(-1, patch_targets.shape[-1])
    numbers = flat[:, 5].astype(np.int64)
    bits = np.where(flat[:, 0] > 0, np.int64(1) << numbers, np.int64(0))
    shown: NDArray[np.int64] = np.bitwise_or.reduce(
        np.where(pooling >= 0, bits[pooling], 0), axis=1
    )
    return shown


def pooled_targets(
    patch_targets: NDArray[np.float32], pooling: NDArray[np.int64]
) -> NDArray[np.float32]:
    """For each visual token the target of the first marked patch that it pools: (M, columns)."""
    flat = patch_targets.reshape(-1, patch_targets.shape[-1])
    marked = (pooling >= 0) & (flat[pooling, 0] > 0)
    first = pooling[np.arange(len(pooling)), marked.argmax(axis=1)]
    chosen: NDArray[np.float32] = flat[first] * marked.any(axis=1, keepdims=True)
    return chosen
