"""The token loss: weighted cross-entropy over positions, with a penalty on the logits' scale.

Knows: hidden states, the language head, targets and weights. Does not know: data, steps, ranks.
Source: the loss of Molmo2's training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    z_weight: float = 1e-4
    """Factor on the square of the logarithm of the softmax's denominator; 0: without."""
    chunk_size: int = 2048
    """Positions whose logits exist at the same time."""


class LossSums(NamedTuple):
    """Sums over positions, each times the position's weight; scalars in float32."""

    cross_entropy: Tensor
    z: Tensor
    """z_weight · (log Σ exp logits)²"""
    right: Tensor
    """Positions whose most probable token is the target; has no gradient."""
    weight: Tensor
    """The weights themselves."""

    @property
    def total(self) -> Tensor:
        return self.cross_entropy + self.z


def token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, config: LossConfig
) -> LossSums:
    """Sums over N positions: hidden (N, D), head (V, D), targets (N,), weights (N,).

    Positions of weight 0 cost nothing. Logits are computed `chunk_size` positions at a time, and
    again in the backward pass, so that all of them never exist at once.
    """
    learnt = weights > 0
    hidden, targets, weights = hidden[learnt], targets[learnt], weights[learnt].float()
    sums = hidden.new_zeros(3, dtype=torch.float32)
    # Nothing learnt is one empty chunk: the loss is 0 and its gradients are, not missing.
    for begin in range(0, max(len(hidden), 1), config.chunk_size):
        here = slice(begin, begin + config.chunk_size)
        sums = sums + checkpoint(
            _chunk_sums,
            head,
            hidden[here],
            targets[here],
            weights[here],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return LossSums(sums[0], config.z_weight * sums[1], sums[2].detach(), weights.sum())


def _chunk_sums(head: Tensor, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, head).float()
    normaliser = logits.logsumexp(-1)
    losses = normaliser - logits.gather(-1, targets[:, None]).squeeze(-1)
    right = logits.detach().argmax(-1) == targets
    columns = torch.stack([losses, normaliser.square(), right.float()])
    return (columns * weights).sum(-1)
