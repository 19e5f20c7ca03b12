"""From an example to arrays: its text and media as tokens, crops, pooling index, marked patches.

Knows: what stands in the prefix and how turns are written. Does not know: how branches are laid
behind it and weighted (`tree`), where examples come from, batches, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidExample
from molmo_core.images import (
    ImageGeometry,
    ImageGrid,
    PreparedImage,
    image_tokens,
    prepare_image,
    tiling_of,
)
from molmo_core.prompts import (
    Turn,
    media_placeholders,
    render_subtitles,
    select_subtitles,
    user_turn,
)
from molmo_core.tokens import IM_PATCH, IMAGE, TURN_END
from molmo_core.videos import VideoGeometry, prepare_frames, video_text
from molmo_training.data.example import Branch, Example, MarkedObject, Tokenized
from molmo_training.data.tree import (
    UNLIMITED,
    UNWEIGHTED,
    TokenBranch,
    TreeLimits,
    Weighting,
    build_tree,
)

Encode = Callable[[str], list[int]]

MessageFormat = Literal["qwen3", "role", "none"]
"""How turns are told apart: chat markers (all released models), names, or a space."""


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What turns examples into arrays: the text encoder and the geometry of the media."""

    encode: Encode
    images: ImageGeometry
    videos: VideoGeometry
    message_format: MessageFormat = "qwen3"
    weighting: Weighting = UNWEIGHTED
    """Where a branch does not say otherwise."""
    limits: TreeLimits = UNLIMITED
    last_answer_only: bool = False
    """Whether earlier answers of a conversation are only read."""
    max_answer_tokens: int | None = None
    """Longer answers are cut."""
    subtitles_within_s: float | None = 1.0
    """Speech that far from a frame is shown; None: all of it."""

    def __call__(self, example: Example) -> Tokenized:
        prefix, media = self._prefix(example)
        eos = self.encode(TURN_END)
        branches = [self._branch(branch, eos) for branch in example.branches]
        tree = build_tree(eos + prefix, branches, eos[0], self.limits)
        pooling, patch_targets = _joint_pooling(media), self._patch_targets(example)
        is_visual = tree.input_ids == self.encode(IM_PATCH)[0]
        if int(is_visual.sum()) != len(pooling):
            raise InvalidExample("a text of the example spells out visual tokens: take them out")
        shows = np.zeros(len(tree.input_ids), dtype=np.int64)
        shows[is_visual] = shown_objects(patch_targets, pooling)
        return Tokenized(
            input_ids=tree.input_ids,
            targets=tree.targets,
            weights=tree.weights,
            position_ids=tree.position_ids,
            subsegments=tree.subsegments,
            crops=np.concatenate([m.crops for m in media]),
            pooling=pooling,
            patch_targets=patch_targets,
            token_targets=pooled_targets(patch_targets, pooling),
            about=tree.marks,
            shows=shows,
        )

    def _prefix(self, example: Example) -> tuple[list[int], list[PreparedImage]]:
        if len(example.frames):
            video = prepare_frames(example.frames, self.videos)
            text = video_text(example.frame_times_s, self.videos)
            return self.encode(text + self._subtitles(example)), [video]
        if not len(example.images):
            return [], [_no_media(self.images)]
        media = [_seen_once(prepare_image(pixels, self.images)) for pixels in example.images]
        pieces = media_placeholders(len(media), 0).split(IMAGE)
        blocks = ["".join(image_tokens(m.grid, self.images)) for m in media]
        text = "".join(p + b for p, b in zip(pieces, [*blocks, ""], strict=True))
        return self.encode(text), media

    def _subtitles(self, example: Example) -> str:
        subtitles, within_s = example.subtitles, self.subtitles_within_s
        if within_s is not None:
            subtitles = select_subtitles(subtitles, example.frame_times_s, within_s=within_s)
        return render_subtitles(subtitles)

    def _branch(self, branch: Branch, eos: list[int]) -> TokenBranch:
        """The pieces of a branch; EOS after each answer but the last."""
        pieces: list[tuple[list[int], bool]] = []
        last = len(branch.turns) - 1
        for index, turn in enumerate(branch.turns):
            ids = self.encode(turn_text(turn, index, self.message_format))
            if turn.role == "user":
                pieces.append((ids, False))
                continue
            ids = ids[: self.max_answer_tokens] + ([] if index == last else eos)
            pieces.append((ids, index == last or not self.last_answer_only))
        return TokenBranch(
            pieces=pieces,
            factor=branch.weight,
            weighting=Weighting(
                root_subsegments=_or_default(
                    branch.root_subsegments, self.weighting.root_subsegments
                ),
                root_length=_or_default(branch.root_length, self.weighting.root_length),
            ),
            mark=sum(1 << n for n in set(branch.about)),
        )

    def _patch_targets(self, example: Example) -> NDArray[np.float32]:
        if len(example.frames):
            n = self.videos.crop_px // self.videos.patch_px
            marks = example.objects or [()] * len(example.frames)
            return np.stack([mark_patches(objects, n, n) for objects in marks])
        geometry, n = self.images, self.images.crop_patches
        if not len(example.images):
            return np.zeros((0, n * n, 8), dtype=np.float32)
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


def turn_text(turn: Turn, index: int, message_format: MessageFormat) -> str:
    """What the `index`-th turn of a conversation is written as, its end token left out."""
    if turn.role == "assistant":
        return turn.text if message_format == "qwen3" else f" {turn.text}"
    if message_format == "qwen3":
        return user_turn(turn.text, is_first=index == 0)
    text = f"User: {turn.text} Assistant:" if message_format == "role" else turn.text
    return f" {text}" if index else text


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _no_media(geometry: ImageGeometry) -> PreparedImage:
    n_patches, n_values = geometry.crop_patches**2, geometry.patch_px**2 * 3
    n_pooled = int(np.prod(geometry.pooling_hw))
    return PreparedImage(
        np.zeros((0, n_patches, n_values), dtype=np.float32),
        np.zeros((0, n_pooled), dtype=np.int64),
        ImageGrid(0, 0, 0, 0),
    )


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
