"""The attention mask of a row as a small picture, computed by the model's own rule.

Rows look, columns are seen. Long rows are shown by a choice of their positions: whether one
position sees another depends on these two alone.
Knows: subsegments, colours. Does not know: tokens' text, HTML.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from molmo_hf.modeling_molmo2 import EXAMPLE_STRIDE, attention_mask
from molmo_training.data.example import Tokenized
from molmo_training.data.tree import PREFIX_SUBSEGMENT

MOST_POSITIONS = 360
_VISUAL_RGBA, _SHARED_RGBA, _OWN_RGBA = (
    (245, 158, 66, 255),
    (120, 134, 156, 255),
    (66, 133, 244, 255),
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of positions in the picture, in parts of its side."""

    begin: float
    end: float
    name: str
    number: int
    """Of the example in a pack, else of the branch; −1: shared by all branches."""


@dataclass(frozen=True, kw_only=True)
class MaskPicture:
    url: str
    n_positions: int
    n_shown: int
    share: float
    """Of all pairs of positions, those that see."""
    spans: tuple[Span, ...]


def draw_mask(row: Tokenized, visual_ids: frozenset[int]) -> MaskPicture:
    n_positions = len(row.input_ids)
    chosen = np.unique(np.linspace(0, n_positions - 1, min(n_positions, MOST_POSITIONS)).round())
    chosen = chosen.astype(np.int64)
    subsegments = row.subsegments[chosen]
    is_visual = np.isin(row.input_ids[chosen], sorted(visual_ids))
    sees = attention_mask(
        torch.ones(1, len(chosen), dtype=torch.bool),
        torch.from_numpy(is_visual)[None] if visual_ids else None,
        torch.from_numpy(subsegments)[None],
    )[0, 0].numpy()
    is_shared = subsegments % EXAMPLE_STRIDE == PREFIX_SUBSEGMENT
    colours = np.zeros((*sees.shape, 4), dtype=np.uint8)
    colours[sees] = _OWN_RGBA
    colours[sees & is_shared[None, :]] = _SHARED_RGBA
    colours[sees & is_visual[None, :] & is_visual[:, None]] = _VISUAL_RGBA
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG", optimize=True)
    return MaskPicture(
        url="data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        n_positions=n_positions,
        n_shown=len(chosen),
        share=float(sees.mean()),
        spans=_spans(row.subsegments),
    )


def _spans(subsegments: NDArray[np.int64]) -> tuple[Span, ...]:
    n_positions, n_examples = len(subsegments), int(subsegments.max() // EXAMPLE_STRIDE) + 1
    bounds = [0, *(np.flatnonzero(np.diff(subsegments)) + 1).tolist(), n_positions]
    spans = []
    for begin, end in pairwise(bounds):
        example, inside = divmod(int(subsegments[begin]), EXAMPLE_STRIDE)
        is_shared = inside == PREFIX_SUBSEGMENT
        name = "shared" if is_shared else f"branch {inside + 1}"
        spans.append(
            Span(
                begin=begin / n_positions,
                end=end / n_positions,
                name=f"example {example + 1}, {name}" if n_examples > 1 else name,
                number=example if n_examples > 1 else -1 if is_shared else inside,
            )
        )
    return tuple(spans)
