"""The types that pass along the data pipeline: `Example` (raw), `Tokenized` (arrays), `Batch`.

Shapes: B rows, S tokens, C crops, P patches a crop, M visual tokens, K patches a token pools.
Knows: nothing but the types. Source: message trees and loss weights of Molmo2's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from molmo_core.prompts import Subtitle, Turn


class Picture(Protocol):
    """(H, W, 3) bytes, or what knows its shape and becomes them: `np.asarray` opens it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self) -> NDArray[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One conversation about the media; branches of an example do not see each other."""

    turns: tuple[Turn, ...]
    weight: float = 1.0
    """Factor on the loss of every answer token of this branch."""
    root_subsegments: bool | None = None
    """Whether the loss is divided by √branches; None: as `Tokenizing` has it."""
    root_length: bool | None = None
    """Whether it is multiplied by 2/√(answer tokens); None: as `Tokenizing` has it."""
    about: tuple[int, ...] = ()
    """Numbers of the marked objects that the answer is about, where known."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Media and what is asked about them; images or one video, not both, or neither."""

    branches: tuple[Branch, ...]
    images: Sequence[Picture] = ()
    max_crops: int | None = None
    """Most tiles of each of the images; None: as `Tokenizing` has it."""
    frames: Sequence[Picture] = ()
    """Opened all at once: `np.asarray` of them is (T, H, W, 3)."""
    frame_times_s: Sequence[float] = ()
    subtitles: Sequence[Subtitle] = ()
    """Speech in the video; the model sees what falls near a frame."""
    objects: Sequence[Sequence[MarkedObject]] = ()
    """What stands in each image or frame, where known: trains the vision tower directly."""


@dataclass(frozen=True, kw_only=True)
class MarkedObject:
    """An object's centre in 0…1, its kind as class numbers, its number (0…62) in the example.

    `radius_xy` is its extent to each side, in parts of the picture's width and height.
    """

    x: float
    y: float
    shape: int
    colour: int
    number: int = 0
    radius_xy: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """One example as arrays. Targets are shifted: position s predicts `targets[s]`."""

    input_ids: NDArray[np.int64]  # (S,)
    targets: NDArray[np.int64]  # (S,)
    weights: NDArray[np.float32]  # (S,) 0 where nothing is learnt
    position_ids: NDArray[np.int64]  # (S,)
    subsegments: NDArray[np.int64]  # (S,)
    crops: NDArray[np.uint8]  # (C, P, pixels)
    pooling: NDArray[np.int64]  # (M, K) into C · P, −1 = none
    patch_targets: NDArray[np.float32]  # (C, P, 8): see `marks.mark_patches`
    token_targets: NDArray[np.float32]  # (M, 8): those of a visual token's first marked patch
    about: NDArray[np.int64]  # (S,) bit n: a token of an answer about object n
    shows: NDArray[np.int64]  # (S,) bit n: this visual token shows the centre of object n
    n_cut: int = 0
    """Examples of which answers did not fit whole: 0 or 1, or those of a pack."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded to one length; `pooling` counts over all crops of the batch."""

    input_ids: Tensor  # (B, S)
    targets: Tensor  # (B, S)
    weights: Tensor  # (B, S)
    position_ids: Tensor  # (B, S)
    subsegments: Tensor  # (B, S)
    valid: Tensor  # (B, S) bool
    crops: Tensor  # (C, P, pixels) bytes, see `pixels.normalised`
    pooling: Tensor  # (M, K)
    patch_targets: Tensor  # (C, P, 8)
    token_targets: Tensor  # (M, 8)
    about: Tensor  # (B, S)
    shows: Tensor  # (B, S)
    n_examples: int = 0
    n_cut: int = 0
    """Those of which answers did not fit whole."""
