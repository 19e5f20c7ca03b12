"""From an example to arrays: its text and media as tokens, crops, pooling index, marked patches.

The outline (tokens, number of crops) follows from text and sizes alone; pixels are opened after it.
Knows: what stands in the prefix and how turns are written. Does not know: how branches are laid
behind it and weighted (`tree`), where examples come from, batches, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidExample
from molmo_core.images import (
    ImageGeometry,
    cut_image,
    grid_of,
    image_pooling,
    image_tokens,
    tiling_of,
)
from molmo_core.prompts import media_placeholders, render_subtitles, select_subtitles, user_turn
from molmo_core.tokens import IM_PATCH, IMAGE, TURN_END
from molmo_core.videos import (
    VideoGeometry,
    cut_frames,
    frame_pooling,
    frame_tokens,
    timestamp_text,
)
from molmo_training.data.example import Branch, Example, Tokenized
from molmo_training.data.marks import mark_patches, pooled_targets, shown_objects
from molmo_training.data.tree import (
    UNLIMITED,
    UNWEIGHTED,
    TokenBranch,
    Tree,
    TreeLimits,
    Weighting,
    build_tree,
)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """An example as far as it is known without its pixels."""

    tree: Tree
    n_crops: int


class _Prefix(NamedTuple):
    ids: list[int]
    n_visual: int
    n_crops: int


class _Media(NamedTuple):
    """A picture or a video, cut."""

    crops: NDArray[np.uint8]  # (C, P, pixels)
    pooling: NDArray[np.int64]  # (M, K) into C · P


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What turns examples into arrays: the text encoder and the geometry of the media."""

    encode: Encode
    images: ImageGeometry
    videos: VideoGeometry
    weighting: Weighting = UNWEIGHTED
    """Where a branch does not say otherwise."""
    limits: TreeLimits = UNLIMITED
    bos_id: int | None = None
    """First token of every row; None: that which ends a turn, for tokenizers without one."""
    subtitles_within_s: float | None = 1.0
    """Speech that far from a frame is shown; None: all of it."""

    def __call__(self, example: Example) -> Tokenized:
        return self.finish(example, self.outline(example))

    def outline(self, example: Example) -> Outline:
        """Everything but the pixels, which are not opened. Raises InvalidExample."""
        prefix = self._prefix(example)
        eos = self.encode(TURN_END)
        branches = [self._branch(branch, eos) for branch in example.branches]
        first = eos[0] if self.bos_id is None else self.bos_id
        tree = build_tree([first, *prefix.ids], branches, eos[0], self.limits)
        if int((tree.input_ids == self.encode(IM_PATCH)[0]).sum()) != prefix.n_visual:
            raise InvalidExample("a text of the example spells out visual tokens: take them out")
        return Outline(tree=tree, n_crops=prefix.n_crops)

    def finish(self, example: Example, outline: Outline) -> Tokenized:
        """Open the pixels of the example that the outline is of."""
        media, tree = self._media(example), outline.tree
        pooling, patch_targets = _joint_pooling(media), self._patch_targets(example)
        shows = np.zeros(len(tree.input_ids), dtype=np.int64)
        is_visual = tree.input_ids == self.encode(IM_PATCH)[0]
        shows[is_visual] = shown_objects(patch_targets, pooling)
        return Tokenized(
            input_ids=tree.input_ids,
            targets=tree.targets,
            weights=tree.weights,
            position_ids=tree.position_ids,
            subsegments=tree.subsegments,
            crops=media[0].crops if len(media) == 1 else np.concatenate([m.crops for m in media]),
            pooling=pooling,
            patch_targets=patch_targets,
            token_targets=pooled_targets(patch_targets, pooling),
            about=tree.marks,
            shows=shows,
            n_cut=int(tree.is_cut),
        )

    def _prefix(self, example: Example) -> _Prefix:
        """The text of the media, encoded piece by piece: special tokens part the pieces anyway."""
        ids: list[int] = []
        if len(example.frames):
            frame = self._special(frame_tokens(self.videos))
            for k, time_s in enumerate(example.frame_times_s):
                ids += self.encode(timestamp_text(time_s, is_first=k == 0)) + frame
            ids += self.encode(self._subtitles(example))
            n_frames = len(example.frame_times_s)
            rows, cols = self.videos.frame_rows, self.videos.frame_cols
            return _Prefix(ids, n_visual=n_frames * rows * cols, n_crops=n_frames)
        geometry = self.image_geometry(example)
        names = media_placeholders(len(example.images), 0).split(IMAGE)[:-1]
        n_visual = n_crops = 0
        for name, picture in zip(names, example.images, strict=True):
            size_hw = (picture.shape[0], picture.shape[1])
            grid = grid_of(size_hw, geometry)
            ids += self.encode(name) + self._special(image_tokens(grid, geometry))
            n_visual += grid.low_rows * grid.low_cols + grid.high_rows * grid.high_cols
            rows, cols = tiling_of(size_hw, geometry)
            n_crops += 1 if rows * cols == 1 else 1 + rows * cols
        return _Prefix(ids, n_visual=n_visual, n_crops=n_crops)

    def _special(self, tokens: Sequence[str]) -> list[int]:
        id_of = {token: self.encode(token)[0] for token in set(tokens)}
        return [id_of[token] for token in tokens]

    def image_geometry(self, example: Example) -> ImageGeometry:
        """How each of its images is cut."""
        if example.max_crops is None:
            return self.images
        return replace(self.images, max_crops=example.max_crops)

    def _media(self, example: Example) -> list[_Media]:
        if len(example.frames):
            crops = cut_frames(np.asarray(example.frames), self.videos)
            return [_Media(crops, frame_pooling(len(crops), self.videos))]
        geometry = self.image_geometry(example)
        media = []
        for picture in example.images:
            pixels = np.asarray(picture)
            if pixels.shape[:2] != picture.shape[:2]:
                raise InvalidExample(
                    f"a picture has {pixels.shape[:2]} pixels where its header says "
                    f"{picture.shape[:2]}: replace the file"
                )
            media.append(_cut_once(pixels, geometry))
        return media or [_no_media(self.images)]

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
            if turn.role == "user":
                pieces.append((self.encode(user_turn(turn.text, is_first=index == 0)), False))
            else:
                pieces.append((self.encode(turn.text) + ([] if index == last else eos), True))
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
        geometry, n = self.image_geometry(example), self.images.crop_patches
        if not len(example.images):
            return np.zeros((0, n * n, 8), dtype=np.float32)
        marks = example.objects or [()] * len(example.images)
        crops: list[NDArray[np.float32]] = []
        for picture, objects in zip(example.images, marks, strict=True):
            crops.append(mark_patches(objects, n, n))
            step = geometry.window_px // geometry.patch_px
            margin = sum(geometry.overlap_margins)
            rows, cols = tiling_of((picture.shape[0], picture.shape[1]), geometry)
            if rows * cols == 1:
                continue
            whole = mark_patches(objects, rows * step + margin, cols * step + margin)
            whole = whole.reshape(rows * step + margin, cols * step + margin, -1)
            for tile in range(rows * cols):
                top, left = (tile // cols) * step, (tile % cols) * step
                crops.append(whole[top : top + n, left : left + n].reshape(n * n, -1))
        return np.stack(crops)


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _no_media(geometry: ImageGeometry) -> _Media:
    n_patches, n_values = geometry.crop_patches**2, geometry.patch_px**2 * 3
    n_pooled = int(np.prod(geometry.pooling_hw))
    return _Media(
        np.zeros((0, n_patches, n_values), dtype=np.uint8),
        np.zeros((0, n_pooled), dtype=np.int64),
    )


def _cut_once(pixels: NDArray[np.uint8], geometry: ImageGeometry) -> _Media:
    """Without the tile of an image that is a single one: it is the view of the whole, so that the
    tower would compute the same twice. The visual tokens stay."""
    crops = cut_image(pixels, geometry)
    pooling = image_pooling(*tiling_of(pixels.shape[:2], geometry), geometry)
    if len(crops) != 2:
        return _Media(crops, pooling)
    n = crops.shape[1]
    return _Media(crops[:1], np.where(pooling >= n, pooling - n, pooling))


def _joint_pooling(media: Sequence[_Media]) -> NDArray[np.int64]:
    """Indices of each image, shifted behind the patches of the images before it."""
    shifted, first = [], 0
    for part in media:
        shifted.append(np.where(part.pooling >= 0, part.pooling + first, -1))
        first += part.crops.shape[0] * part.crops.shape[1]
    return np.concatenate(shifted)
