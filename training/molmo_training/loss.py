"""Losses: weighted token loss, and what the vision tower learns of marked objects.

Knows: tensors. Does not know: models, data.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy over N positions, and the share predicted right.

    logits (N, V) in any float type, targets (N,), weights (N,) all positive.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    total = weights.sum()
    accuracy = ((logits.argmax(-1) == targets) * weights).sum() / total
    return (losses * weights).sum() / total, accuracy


class PatchProbe(nn.Module):
    """Reads objects off patch features: teaches a vision tower from nothing where things are.

    A from-scratch stand-in for the pre-trained tower that larger runs start from; it is thrown
    away after training. Input (C, P, D); targets (C, P, 5): present, shape, colour, dx, dy.
    """

    def __init__(self, width: int, n_shapes: int, n_colours: int) -> None:
        super().__init__()
        self.sizes = (1, n_shapes, n_colours, 2)
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        present = targets[..., 0] > 0
        found, shape, colour, offset = self.read(features).float().split(self.sizes, dim=-1)
        positive_share = 8.0  # objects stand at about one patch in twenty
        loss = F.binary_cross_entropy_with_logits(
            found.squeeze(-1), targets[..., 0], pos_weight=found.new_tensor(positive_share)
        )
        if not present.any():
            return loss
        marked = targets[present]
        loss = loss + F.cross_entropy(shape[present], marked[:, 1].long())
        loss = loss + F.cross_entropy(colour[present], marked[:, 2].long())
        return loss + F.mse_loss(offset[present], marked[:, 3:])
