"""From an image to crops, patches and pooling index; token counts without touching pixels.

Knows: tiling, pooling, the token layout of an image block. Does not know: how pixels are resized
and cut into patches (`pixels`), token ids, files, torch. Source: Molmo2's image processor as
released; the reference numbers of the parity folder.

Sizes are (height, width). A *crop* is one square that the vision tower sees; a *patch* is a
`patch_px` square of it; a *visual token* pools up to `pooling_hw` patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .molmo2_pixels import normalised, patch_grid, resize_bilinear
from .molmo2_tokens import IM_COL, IM_END, IM_PATCH, IM_START, LOW_RES_IM_START


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """How images are cut; the defaults are those of the released checkpoints."""

    crop_px: int = 378
    patch_px: int = 14
    pooling_hw: tuple[int, int] = (2, 2)
    max_crops: int = 8
    """Most tiles of one image, the view of the whole image not counted."""
    overlap_margins: tuple[int, int] = (4, 4)
    """Patches at the low and high side of a crop that the neighbouring crop covers."""
    use_col_tokens: bool = True
    use_single_crop_col_tokens: bool | None = False
    """Column tokens in the view of the whole image; None: as `use_col_tokens`."""
    use_single_crop_start_token: bool = True

    @property
    def crop_patches(self) -> int:
        return self.crop_px // self.patch_px

    @property
    def margin_px(self) -> int:
        return sum(self.overlap_margins) * self.patch_px

    @property
    def window_px(self) -> int:
        return self.crop_px - self.margin_px


class ImageGrid(NamedTuple):
    """Visual tokens per side: the whole view (rows, columns), then the tiled view."""

    low_rows: int
    low_cols: int
    high_rows: int
    high_cols: int


class PreparedImage(NamedTuple):
    """What the model takes of one image."""

    crops: NDArray[np.float32]  # (1 + tiles, patches, patch_px² · 3), whole view first
    pooling: NDArray[np.int64]  # (visual tokens, patches pooled), −1 = none
    grid: ImageGrid


def select_tiling(height: int, width: int, window_px: int, max_crops: int) -> tuple[int, int]:
    """Choose (rows, columns) of tiles for an image of which the margins are already taken off.

    The smallest tiling that needs no downscaling wins; if all need it, the one that needs least.
    Sizes of zero or less (images thinner than the margins) behave as in the released processor:
    the scale of that side is infinite or negative.
    """
    tilings = sorted(
        ((rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops + 1)
         if rows * cols <= max_crops),
        key=lambda t: (t[0] * t[1], t[0]),
    )  # fmt: skip
    sizes = np.array(tilings, dtype=np.float32) * window_px
    with np.errstate(divide="ignore"):
        scales = np.min(sizes / np.array([[height, width]], dtype=np.float32), axis=1)
    if np.all(scales < 1):
        return tilings[int(np.argmax(scales))]
    return tilings[int(np.argmin(np.where(scales < 1.0, np.float32(10e9), scales)))]


def tiling_of(size_hw: tuple[int, int], geometry: ImageGeometry) -> tuple[int, int]:
    """Tiles (rows, columns) that an image of `size_hw` pixels is cut into."""
    return select_tiling(
        size_hw[0] - geometry.margin_px,
        size_hw[1] - geometry.margin_px,
        geometry.window_px,
        geometry.max_crops,
    )


def grid_of(size_hw: tuple[int, int], geometry: ImageGeometry) -> ImageGrid:
    rows, cols = tiling_of(size_hw, geometry)
    pool_h, pool_w = geometry.pooling_hw
    step = geometry.window_px // geometry.patch_px
    margin = sum(geometry.overlap_margins)
    return ImageGrid(
        -(-geometry.crop_patches // pool_h),
        -(-geometry.crop_patches // pool_w),
        -(-(rows * step + margin) // pool_h),
        -(-(cols * step + margin) // pool_w),
    )


def image_tokens(grid: ImageGrid, geometry: ImageGeometry) -> list[str]:
    """The token layout of one image block: the whole view, then the tiled view."""
    low_cols = geometry.use_single_crop_col_tokens
    low = _rows(
        grid.low_rows, grid.low_cols, geometry.use_col_tokens if low_cols is None else low_cols
    )
    high = _rows(grid.high_rows, grid.high_cols, geometry.use_col_tokens)
    low_start = LOW_RES_IM_START if geometry.use_single_crop_start_token else IM_START
    return [low_start, *low, IM_END, IM_START, *high, IM_END]


def count_image_tokens(size_hw: tuple[int, int], geometry: ImageGeometry) -> int:
    """Number of tokens of the image block, from the size alone."""
    grid = grid_of(size_hw, geometry)
    low_cols = geometry.use_single_crop_col_tokens
    has_low_cols = geometry.use_col_tokens if low_cols is None else low_cols
    return (
        4
        + grid.low_rows * (grid.low_cols + has_low_cols)
        + grid.high_rows * (grid.high_cols + geometry.use_col_tokens)
    )


def prepare_image(pixels: NDArray[np.uint8], geometry: ImageGeometry) -> PreparedImage:
    """Cut an RGB image (H, W, 3) into normalised crops with their pooling index.

    Pixels come out in −1…1; a patch is flattened row by row, channels last.
    """
    size_hw = pixels.shape[:2]
    return PreparedImage(
        normalised(cut_image(pixels, geometry)),
        image_pooling(*tiling_of(size_hw, geometry), geometry),
        grid_of(size_hw, geometry),
    )


def cut_image(pixels: NDArray[np.uint8], geometry: ImageGeometry) -> NDArray[np.uint8]:
    """The crops of `prepare_image` as bytes: (1 + tiles, patches, patch_px² · 3)."""
    rows, cols = tiling_of(pixels.shape[:2], geometry)
    side, step, n = geometry.crop_px, geometry.window_px, geometry.crop_patches
    tiled_hw = (rows * step + geometry.margin_px, cols * step + geometry.margin_px)
    # Tiles overlap by whole patches: the picture is cut into patches once for all of them.
    patches = patch_grid(resize_bilinear(pixels, tiled_hw), geometry.patch_px)
    crops = np.empty((1 + rows * cols, n, n, patches.shape[2]), dtype=np.uint8)
    crops[0] = patch_grid(resize_bilinear(pixels, (side, side)), geometry.patch_px)
    step //= geometry.patch_px
    for tile in range(rows * cols):
        top, left = (tile // cols) * step, (tile % cols) * step
        crops[1 + tile] = patches[top : top + n, left : left + n]
    return crops.reshape(len(crops), n * n, -1)


def image_pooling(rows: int, cols: int, geometry: ImageGeometry) -> NDArray[np.int64]:
    """Patch indices that each visual token pools: whole view first, then the tiled view.

    Every patch of the composed grid is taken from exactly one crop: inside an overlap the crop
    that owns it is the one whose margin it is not.
    """
    n = geometry.crop_patches
    whole = pool_indices(np.arange(n * n).reshape(n, n), geometry.pooling_hw)
    composed = _composed_grid(rows, cols, geometry)
    return np.concatenate([whole, pool_indices(composed + n * n, geometry.pooling_hw)])


def _composed_grid(rows: int, cols: int, geometry: ImageGeometry) -> NDArray[np.int64]:
    """For each patch of the tiled image: its index among the patches of the tiles."""
    n = geometry.crop_patches
    low, high = geometry.overlap_margins
    row_of = _owners(rows, n, low, high)
    col_of = _owners(cols, n, low, high)
    tile_row, in_row = row_of[:, 0], row_of[:, 1]
    tile_col, in_col = col_of[:, 0], col_of[:, 1]
    tile = tile_row[:, None] * cols + tile_col[None, :]
    return tile * n * n + in_row[:, None] * n + in_col[None, :]


def _owners(n_tiles: int, n: int, low: int, high: int) -> NDArray[np.int64]:
    """(tile, offset inside it) for each patch along one side of the composed grid."""
    kept = []
    for tile in range(n_tiles):
        first = 0 if tile == 0 else low
        last = n if tile == n_tiles - 1 else n - high
        kept += [(tile, offset) for offset in range(first, last)]
    return np.array(kept, dtype=np.int64)


def pool_indices(grid: NDArray[np.int64], pooling_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Group a grid of indices into windows: (tokens, window area), −1 where the window overhangs.

    The overhang is split with the smaller half in front.
    """
    pool_h, pool_w = pooling_hw
    pad_h, pad_w = -grid.shape[0] % pool_h, -grid.shape[1] % pool_w
    padded = np.pad(
        grid,
        ((pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2)),
        constant_values=-1,
    )
    height, width = padded.shape[0] // pool_h, padded.shape[1] // pool_w
    windows = padded.reshape(height, pool_h, width, pool_w).transpose(0, 2, 1, 3)
    return windows.reshape(height * width, pool_h * pool_w)


def _rows(n_rows: int, n_cols: int, has_col_tokens: bool) -> list[str]:
    row = [IM_PATCH] * n_cols + ([IM_COL] if has_col_tokens else [])
    return row * n_rows
