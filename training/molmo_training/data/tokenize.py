"""From an example to arrays: message tree, loss weights, positions, crops, pooling index.

Knows: the token layout of training (branches behind a shared visual prefix). Does not know:
where examples come from, batches, models. Source: spec of Molmo2's training, message trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molmo_core.images import ImageGeometry, PreparedImage, image_tokens, prepare_image, tiling_of
from molmo_core.prompts import media_placeholders, user_turn
from molmo_core.tokens import IM_PATCH, IMAGE, TURN_END
from molmo_core.videos import VideoGeometry, prepare_frames, video_text
from molmo_training.data.example import Branch, Example, MarkedObject, Tokenized

PREFIX_SUBSEGMENT = 10_000
"""Sub-segment id of the tokens that all branches see."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What turns examples into arrays: the text encoder and the geometry of the media."""

    encode: Encode
    images: ImageGeometry
    videos: VideoGeometry

    def __call__(self, example: Example) -> Tokenized:
        prefix, media = self._prefix(example)
        eos = self.encode(TURN_END)
        ids, targets, weights, positions, subsegments = _start(eos + prefix)
        about = [0] * len(ids)
        for number, branch in enumerate(example.branches):
            b_ids, b_weights = self._branch(branch, eos)
            ids += b_ids
            targets += b_ids[1:] + eos
            weights += [*b_weights[1:], b_weights[-1]]
            positions += range(len(eos) + len(prefix), len(eos) + len(prefix) + len(b_ids))
            subsegments += [number] * len(b_ids)
            bits = sum(1 << n for n in set(branch.about))
            about += [bits if weight > 0 else 0 for weight in b_weights]
        pooling, patch_targets = _joint_pooling(media), self._patch_targets(example)
        shows = np.zeros(len(ids), dtype=np.int64)
        is_visual = np.array(ids) == self.encode(IM_PATCH)[0]
        shows[is_visual] = shown_objects(patch_targets, pooling)
        return Tokenized(
            input_ids=np.array(ids, dtype=np.int64),
            targets=np.array(targets, dtype=np.int64),
            weights=np.array(weights, dtype=np.float32),
            position_ids=np.array(positions, dtype=np.int64),
            subsegments=np.array(subsegments, dtype=np.int64),
            crops=np.concatenate([m.crops for m in media]),
            pooling=pooling,
            patch_targets=patch_targets,
            token_targets=pooled_targets(patch_targets, pooling),
            about=np.array(about, dtype=np.int64),
            shows=shows,
        )

    def _prefix(self, example: Example) -> tuple[list[int], list[PreparedImage]]:
        if len(example.frames):
            video = prepare_frames(example.frames, self.videos)
            return self.encode(video_text(example.frame_times_s, self.videos)), [video]
        media = [_seen_once(prepare_image(pixels, self.images)) for pixels in example.images]
        pieces = media_placeholders(len(media), 0).split(IMAGE)
        blocks = ["".join(image_tokens(m.grid, self.images)) for m in media]
        text = "".join(p + b for p, b in zip(pieces, [*blocks, ""], strict=True))
        return self.encode(text), media

    def _branch(self, branch: Branch, eos: list[int]) -> tuple[list[int], list[float]]:
        """Tokens and weights of a branch; EOS after each answer but the last."""
        ids: list[int] = []
        weights: list[float] = []
        for index, turn in enumerate(branch.turns):
            is_last = index == len(branch.turns) - 1
            if turn.role == "user":
                piece, weight = self.encode(user_turn(turn.text, is_first=index == 0)), 0.0
            else:
                piece = self.encode(turn.text) + ([] if is_last else eos)
                weight = branch.weight
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def _patch_targets(self, example: Example) -> NDArray[np.float32]:
        if len(example.frames):
            n = self.videos.crop_px // self.videos.patch_px
            marks = example.objects or [()] * len(example.frames)
            return np.stack([mark_patches(objects, n, n) for objects in marks])
        geometry, n = self.images, self.images.crop_patches
        marks = example.objects or [()] * len(example.images)
        crops: list[NDArray[np.float32]] = []
        for pixels, objects in zip(example.images, marks, strict=True):
            crops.append(mark_patches(objects, n, n))
            step = geometry.window_px // geometry.patch_px
            margin = sum(geometry.overlap_margins)
            rows, cols = tiling_of((pixels.shape[0], pixels.shape[1]), geometry)
            if rows * cols == 1:
                continue
            whole = mark_patches(objects, rows * step + margin, cols * step + margin)
            whole = whole.reshape(rows * step + margin, cols * step + margin, -1)
            for tile in range(rows * cols):
                top, left = (tile // cols) * step, (tile % cols) * step
                crops.append(whole[top : top + n, left : left + n].reshape(n * n, -1))
        return np.stack(crops)


def _start(
    prefix: list[int],
) -> tuple[list[int], list[int], list[float], list[int], list[int]]:
    n = len(prefix)
    targets = [*prefix[1:], prefix[-1]]
    return list(prefix), targets, [0.0] * n, list(range(n)), [PREFIX_SUBSEGMENT] * n


def _seen_once(image: PreparedImage) -> PreparedImage:
    """Without the tile of an image that is a single one: it is the view of the whole, so that the
    tower would compute the same twice. The visual tokens stay."""
    if len(image.crops) != 2:
        return image
    n = image.crops.shape[1]
    pooling = np.where(image.pooling >= n, image.pooling - n, image.pooling)
    return image._replace(crops=image.crops[:1], pooling=pooling)


def _joint_pooling(media: Sequence[PreparedImage]) -> NDArray[np.int64]:
    """Indices of each image, shifted behind the patches of the images before it."""
    shifted, first = [], 0
    for part in media:
        shifted.append(np.where(part.pooling >= 0, part.pooling + first, -1))
        first += part.crops.shape[0] * part.crops.shape[1]
    return np.concatenate(shifted)


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
