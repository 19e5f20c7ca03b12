"""Image and video preparation as the specification writes it, in plain numpy: a yardstick.

Whole arrays in floating point, one step after the other, nothing left out or shared; a video is
decoded whole, then its frames are picked. For comparison with `molmo_core.images`,
`molmo_core.videos` and `molmo_hf.video_io`, which must give the same values.

Knows: the algorithm. Does not know: what production does. Source: the project's specification of
Molmo2's preprocessing (tiling, resizing, crops, pooling, sampling times).
"""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

CROP, PATCH, LEFT, RIGHT = 378, 14, 4, 4
SIDE = CROP // PATCH
WINDOW = (SIDE - LEFT - RIGHT) * PATCH
MARGIN = (LEFT + RIGHT) * PATCH


class Plain(NamedTuple):
    crops: NDArray[np.float32]  # (crops, 729, 588)
    pooling: NDArray[np.int64]  # (tokens, patches pooled), −1 = none


def plain_image(pixels: NDArray[np.uint8], max_crops: int = 8) -> Plain:
    """(H, W, 3) bytes to the whole view and overlapping crops of 378 px."""
    rows, cols = plain_tiling(*pixels.shape[:2], max_crops)
    tiled = normalise(resize(pixels, rows * WINDOW + MARGIN, cols * WINDOW + MARGIN))
    crops, owners = [], np.full((rows * cols, SIDE, SIDE), -1)
    for tile in range(rows * cols):
        row, col = divmod(tile, cols)
        crops.append(tiled[row * WINDOW :, col * WINDOW :][:CROP, :CROP])
        ids = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) + tile * SIDE * SIDE
        ids[: LEFT if row else 0] = -1
        ids[:, : LEFT if col else 0] = -1
        ids[SIDE - (RIGHT if row < rows - 1 else 0) :] = -1
        ids[:, SIDE - (RIGHT if col < cols - 1 else 0) :] = -1
        owners[tile] = ids
    in_rows = owners.reshape(rows, cols, SIDE, SIDE).transpose(0, 2, 1, 3).reshape(-1)
    step = SIDE - LEFT - RIGHT
    grid = in_rows[in_rows >= 0].reshape(rows * step + LEFT + RIGHT, cols * step + LEFT + RIGHT)
    whole = normalise(resize(pixels, CROP, CROP))
    low = pool(np.arange(SIDE * SIDE).reshape(SIDE, SIDE), 2)
    return Plain(
        patchify(np.stack([whole, *crops])),
        np.concatenate([low, pool(grid + SIDE * SIDE, 2)]),
    )


def plain_tiling(height: int, width: int, max_crops: int) -> tuple[int, int]:
    candidates = [
        (i, j)
        for i in range(1, max_crops + 1)
        for j in range(1, max_crops + 1)
        if i * j <= max_crops
    ]
    candidates.sort(key=lambda c: (c[0] * c[1], c[0]))
    inner = np.array([height - MARGIN, width - MARGIN], dtype=np.float32)
    scales = (np.array(candidates, dtype=np.float32) * WINDOW / inner).min(axis=1)
    if (scales < 1).all():
        return candidates[int(scales.argmax())]
    return candidates[int(np.where(scales < 1, np.inf, scales).argmin())]


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear, half-pixel centres, no antialiasing: four neighbours of every output pixel."""
    if pixels.shape[:2] == (height, width):
        return pixels
    (top, bottom, y), (left, right, x) = (
        _neighbours(n_in, n_out)
        for n_in, n_out in zip(pixels.shape[:2], (height, width), strict=True)
    )
    values = pixels.astype(np.float32)
    y, x = y[:, None, None], x[None, :, None]
    one = np.float32(1)
    above = (one - x) * values[top[:, None], left] + x * values[top[:, None], right]
    below = (one - x) * values[bottom[:, None], left] + x * values[bottom[:, None], right]
    rounded: NDArray[np.uint8] = np.rint((one - y) * above + y * below).astype(np.uint8)
    return rounded


def _neighbours(
    n_in: int, n_out: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    half = np.float32(0.5)
    at = np.maximum(
        np.float32(n_in / n_out) * (np.arange(n_out, dtype=np.float32) + half) - half, 0
    )
    first = np.minimum(at.astype(np.int64), n_in - 1)
    return first, np.minimum(first + 1, n_in - 1), (at - first).astype(np.float32)


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    mean = std = np.array([0.5, 0.5, 0.5], dtype=np.float32)
    normal: NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return normal


def patchify(crops: NDArray[np.float32]) -> NDArray[np.float32]:
    n = len(crops)
    blocks = crops.reshape(n, SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(blocks.reshape(n, SIDE * SIDE, PATCH * PATCH * 3))


def pool(grid: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    missing = [-side % window for side in grid.shape]
    padded = np.pad(grid, [(m // 2, m - m // 2) for m in missing], constant_values=-1)
    height, width = (side // window for side in padded.shape)
    blocks = padded.reshape(height, window, width, window).transpose(0, 2, 1, 3)
    return blocks.reshape(height * width, window * window)


def plain_video(file: bytes, max_frames: int = 384, max_fps: float = 2.0) -> Plain:
    """The bytes of a file: every frame is decoded, those displayed at the target times stay."""
    frames, shown_s, end_s = _all_frames(file)
    if end_s > (max_frames - 1) / max_fps:
        times = np.linspace(0, end_s, max_frames)
    else:
        times = np.append(np.arange(0, end_s, 1 / max_fps), end_s)
    places = np.searchsorted(shown_s, times + 1e-6, side="right") - 1
    chosen = [frames[place] for place in places]
    crops = patchify(np.stack([normalise(resize(frame, CROP, CROP)) for frame in chosen]))
    one = pool(np.arange(SIDE * SIDE).reshape(SIDE, SIDE), 3)
    offsets = np.arange(len(crops))[:, None, None] * SIDE * SIDE
    return Plain(crops, (one + offsets).reshape(-1, 9))


def _all_frames(file: bytes) -> tuple[list[NDArray[np.uint8]], NDArray[np.float64], float]:
    """(frames, the time each is shown from, the end), seconds from the first frame."""
    with av.open(io.BytesIO(file)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        assert stream.average_rate is not None
        decoded = [
            (float((frame.pts or 0) * stream.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(stream)
        ]
        rate = float(stream.average_rate)
    shown_s = np.array([time_s for time_s, _ in decoded]) - decoded[0][0]
    return [frame for _, frame in decoded], shown_s, float(shown_s[-1] + 1 / rate)
