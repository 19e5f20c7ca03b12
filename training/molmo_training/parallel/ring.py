"""Ring attention: each rank keeps its queries, keys and values go round.

Each rank attends with what it holds while it passes it on. The parts are put together by the
logarithms of their sums; in backward keys and values go round again, and their gradients with them
until they are home. Who sees whom is the rule by places, so that packed rows, trees and visual
tokens are right; what no query of a rank sees is passed on without being scored.

Knows: tiles, the group. Does not know: models.
Shapes: as in `attention.blocks`, S positions of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from molmo_hf.modeling_molmo2 import Tokens
from molmo_training.attention.blocks import Meeting, attend, attend_backward
from molmo_training.parallel.exchange import Passing


class Ring:
    """Attention of this rank's queries to the positions of all; `tokens` has those of each rank."""

    def __init__(self, tokens: Sequence[Tokens], group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        # What this rank holds after n passes comes from n ranks before.
        self._meetings = [Meeting.of(tokens[rank], tokens[(rank - n) % size]) for n in range(size)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D) and twice (B, K, S, D) → (B, H, S, D)."""
        out: Tensor = _RingAttention.apply(q, k, v, self._meetings, self._group)  # type: ignore[no-untyped-call]
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        meetings: list[Meeting],
        group: dist.ProcessGroup,
    ) -> Tensor:
        held = torch.stack([k, v])
        with torch.autocast(q.device.type, enabled=False):
            for step, meeting in enumerate(meetings):
                is_last = step == len(meetings) - 1
                passing = None if is_last else Passing(held, group)
                if step == 0:  # every token sees itself: these sums are never empty
                    out, sums = attend(q, held[0], held[1], meeting)
                elif meeting.is_any:
                    out, sums = _joined(out, sums, *attend(q, held[0], held[1], meeting))
                if passing is not None:
                    held = passing.arrived()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.meetings, ctx.group = meetings, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, sums = ctx.saved_tensors
        held = torch.stack([k, v])
        inner = (d_out.float() * out.float()).sum(-1)
        d_q = torch.zeros_like(q, dtype=torch.float32)
        d_held = torch.zeros_like(held, dtype=torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            for step, meeting in enumerate(ctx.meetings):
                is_last = step == len(ctx.meetings) - 1
                passing = None if is_last else Passing(held, ctx.group)
                if meeting.is_any:
                    more_q, more_k, more_v = attend_backward(
                        q, held[0], held[1], meeting, sums, d_out, inner
                    )
                    d_q += more_q
                    d_held += torch.stack([more_k, more_v])
                d_held = Passing(d_held, ctx.group).arrived()
                if passing is not None:
                    held = passing.arrived()
        return d_q.to(q.dtype), d_held[0].to(k.dtype), d_held[1].to(v.dtype), None, None


def _joined(out: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each."""
    both = torch.logaddexp(sums, more_sums)
    share, more_share = ((s - both).exp()[..., None] for s in (sums, more_sums))
    return out * share + more * more_share, both
