"""torch's FlexAttention over the tiles that are seen: for GPUs, where it is compiled.

Knows: tiles, the rule `sees`. Does not know: processes, models.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from molmo_hf.modeling_molmo2 import Tokens, sees
from molmo_training.attention.tiles import tile_map

_TILE = 128
"""The kernels' own; tiles of other sizes would be cut again."""


class FlexAttend:
    """Attention of rows whose queries and keys are the same tokens (B, S)."""

    def __init__(self, tokens: Tokens) -> None:
        self._mask = block_mask(tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D) and twice (B, K, S, D) → (B, H, S, D)."""
        is_grouped = q.shape[1] != k.shape[1]
        attend = _compiled() if q.is_cuda else flex_attention
        out: Tensor = attend(q, k, v, block_mask=self._mask, enable_gqa=is_grouped)
        return out


def block_mask(tokens: Tokens) -> BlockMask:
    """Tiles that are seen in part, with the rule for their pairs, and those seen as a whole."""
    seen = tile_map(tokens, tokens, _TILE)
    length = tokens.place.shape[1]

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed: Tensor = sees(
            Tokens(*(t[row, query] for t in tokens)), Tokens(*(t[row, key] for t in tokens))
        )
        return allowed

    return BlockMask.from_kv_blocks(
        *_listed(seen.is_seen & ~seen.is_whole),
        *_listed(seen.is_whole),
        BLOCK_SIZE=_TILE,
        mask_mod=may_see,
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys are chosen for each tile of queries, and which, those first."""
    order = torch.argsort((~chosen).int(), dim=-1, stable=True)
    return chosen.sum(-1).int()[:, None], order.int()[:, None]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
