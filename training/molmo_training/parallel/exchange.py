"""What ranks of a context-parallel group send each other, with gradients that go the way back.

Knows: tensors, process groups. Does not know: what the tensors are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first `sent[0]` rows of x (N, …) to rank 0 of the group, the next to rank 1, …

    Gives the rows received, `received[r]` of rank r, in order of ranks. All ranks of the group
    have to call it, backward too.
    """
    out: Tensor = _Exchange.apply(x, tuple(sent), tuple(received), group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(d_out, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(
    x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
    return out


class Passing:
    """A tensor on its way to the next rank of a ring, while another comes from the one before."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._sent = x.contiguous()  # has to live until it is sent
        self._received = torch.empty_like(self._sent)
        ahead, behind = (dist.get_global_rank(group, (rank + k) % size) for k in (1, -1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, ahead, group),
                dist.P2POp(dist.irecv, self._received, behind, group),
            ]
        )

    def arrived(self) -> Tensor:
        """What the rank before has sent."""
        for work in self._works:
            work.wait()
        return self._received
