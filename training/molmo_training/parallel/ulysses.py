"""Ulysses: each rank attends with some heads over the positions of all ranks.

Heads are exchanged for positions before attention and back after it: two exchanges a layer.
Knows: any attention of whole rows, the group. Does not know: who sees whom.
Shapes: B rows, H heads, K heads of keys, R ranks, S positions of all ranks, D width of a head.
"""

from __future__ import annotations

from math import lcm

import torch
import torch.distributed as dist
from torch import Tensor

from molmo_core.errors import TrainingError
from molmo_hf.modeling_molmo2 import Attend
from molmo_training.parallel.exchange import exchange


class Ulysses:
    """Attention over the positions of all ranks; `whole` attends over rows of S positions.

    Its positions come rank after rank.
    """

    def __init__(self, whole: Attend, group: dist.ProcessGroup) -> None:
        self._whole, self._group = whole, group
        self._n_ranks = dist.get_world_size(group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S / R, D) and twice (B, K, S / R, D) → (B, H, S / R, D)."""
        n_heads, n_kv_heads = q.shape[1], k.shape[1]
        check_heads(n_heads, self._n_ranks)
        # As few copies of the heads of keys as give every rank whole ones.
        copies = lcm(n_kv_heads, self._n_ranks) // n_kv_heads
        if copies > 1:
            k, v = (t.repeat_interleave(copies, dim=1) for t in (k, v))
        # By rank: its queries, keys and values.
        parts = [t.reshape(len(t), self._n_ranks, -1, *t.shape[2:]) for t in (q, k, v)]
        sizes = [t.shape[2] for t in parts]
        sent = torch.cat(parts, dim=2).transpose(0, 1)  # (R, B, heads, S / R, D)
        received = self._exchanged(sent)
        rows = received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, heads, S, D)
        out: Tensor = self._whole(*torch.split(rows, sizes, dim=1))
        by_rank = out.reshape(*out.shape[:2], self._n_ranks, -1, out.shape[3])
        return self._exchanged(by_rank.permute(2, 0, 1, 3, 4)).transpose(0, 1).flatten(1, 2)

    def _exchanged(self, x: Tensor) -> Tensor:
        """Part r of x (R, …) goes to rank r."""
        one_each = [1] * self._n_ranks
        return exchange(x, one_each, one_each, self._group)


def check_heads(n_heads: int, degree: int) -> None:
    """Raises TrainingError when heads cannot be dealt out."""
    if n_heads % degree:
        raise TrainingError(
            f"{n_heads} heads cannot be dealt out to {degree} ranks; choose a context_degree that "
            "divides them, or the context_kind 'ring'"
        )
