"""Pixels to what the model takes: resized, cut into patches, normalised; value by value as trained.

Knows: the order of operations, on which the rounding of a byte depends. Does not know: tiling,
frames, files, torch. Source: Molmo2's image processor as released.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 16
_MAX_PLANS = 8


def to_patches(crops: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """(N, S, S, 3) bytes → (N, patches, patch_px² · 3), still bytes."""
    n, side = crops.shape[0], crops.shape[1]
    # Crops one above the other are one tall picture whose patches stand in the same order.
    grid = patch_grid(crops.reshape(n * side, side, 3), patch_px)
    return grid.reshape(n, (side // patch_px) ** 2, -1)


def patch_grid(pixels: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """(H, W, 3) → (H / patch, W / patch, patch² · 3)."""
    height, width = pixels.shape[0] // patch_px, pixels.shape[1] // patch_px
    blocks = pixels.reshape(height, patch_px, width, patch_px * 3).transpose(0, 2, 1, 3)
    return blocks.reshape(height, width, -1)


def normalised(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes → −1…1, by the steps of the released processor: (v/255 − 0.5) / 0.5."""
    values = np.empty(patches.shape, dtype=np.float32)
    for crop, into in zip(patches, values, strict=True):  # one at a time stays in the cache
        np.divide(crop, np.float32(255), out=into, dtype=np.float32)
        into -= np.float32(0.5)
        into *= np.float32(2)  # exactly what dividing by a half gives
    return values


def resize_bilinear(pixels: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W, 3) bytes without antialiasing and without keeping the aspect ratio.

    Half-pixel centres, the result rounded to bytes, as torchvision's bilinear resize with
    `antialias=False`; measured difference to it: 1/255 in about ten values of a
    million (fused multiply-adds).
    """
    height, width = pixels.shape[:2]
    if (height, width) == tuple(size_hw):
        return pixels
    plan = _resize_plan(height, width, *size_hw)
    lines = np.ascontiguousarray(pixels).reshape(height, width * 3)
    resized = np.empty((size_hw[0], size_hw[1] * 3), dtype=np.uint8)
    # In torch's order of operations, along rows first: halves must fall on the same side.
    for part, used, places, w_top, w_bottom in plan.blocks:
        taken = lines[used]
        along = taken.take(plan.left, axis=1, mode="clip") * plan.w_left
        along += taken.take(plan.right, axis=1, mode="clip") * plan.w_right
        n = len(places) // 2
        above, below = along[places[:n]], along[places[n:]]
        above *= w_top
        below *= w_bottom
        above += below
        np.rint(above, out=above)
        np.copyto(resized[part], above, casting="unsafe")
    return resized.reshape(*size_hw, 3)


class _ResizePlan(NamedTuple):
    """What resizing knows before it sees pixels; a row of pixels is one of values, three each."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    w_left: NDArray[np.float32]
    w_right: NDArray[np.float32]
    blocks: list[tuple[slice, NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]]
    """A few output rows each, so that the work stays in the cache: which they are, the input rows
    they need, the place of each one's upper and then of each one's lower among those, weights."""


@lru_cache(maxsize=_MAX_PLANS)
def _resize_plan(height: int, width: int, to_height: int, to_width: int) -> _ResizePlan:
    """Frames of a video and the pictures of a camera are all of one size."""
    top, bottom, row_weight = _taps(height, to_height)
    left, right, col_weight = _taps(width, to_width)
    values = np.arange(3)
    left, right = ((taps[:, None] * 3 + values).reshape(-1) for taps in (left, right))
    w_right, w_bottom = np.repeat(col_weight, 3), row_weight[:, None]
    blocks = []
    for begin in range(0, to_height, _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        used, places = np.unique(np.concatenate([top[part], bottom[part]]), return_inverse=True)
        blocks.append((part, used, places, np.float32(1) - w_bottom[part], w_bottom[part]))
    return _ResizePlan(left, right, np.float32(1) - w_right, w_right, blocks)


def _taps(n_in: int, n_out: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
    """Neighbours and weight of the second one, for each output sample along one side."""
    half = np.float32(0.5)
    centre = np.float32(n_in / n_out) * (np.arange(n_out, dtype=np.float32) + half) - half
    centre = np.maximum(centre, np.float32(0))
    first = np.minimum(centre.astype(np.int64), n_in - 1)
    second = np.minimum(first + 1, n_in - 1)
    return first, second, (centre - first).astype(np.float32)
