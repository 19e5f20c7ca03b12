"""Dropout of the decoder's residual branches that differs between what is read and what is learnt.

Knows: which positions are learnt, from whoever runs the model. Does not know: the decoder's layers
beyond their `dropout`. Source: residual and response dropout of Molmo2's training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration


class Positions:
    """Which positions of the running batch are learnt, (B, S) bool; shared by all layers."""

    def __init__(self) -> None:
        self.learnt: Tensor | None = None


class TokenDropout(nn.Module):
    """Drops with `p_response` where tokens are learnt and with `p` elsewhere."""

    def __init__(self, p: float, p_response: float, positions: Positions) -> None:
        super().__init__()
        self.p, self.p_response, self.positions = p, p_response, positions

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, D)."""
        if not self.training:
            return x
        learnt = self.positions.learnt
        assert learnt is not None, "the positions of the batch are set before the decoder runs"
        kept = torch.where(learnt, 1 - self.p_response, 1 - self.p).to(x.dtype)[..., None]
        return x * (torch.rand_like(x, dtype=torch.float32) < kept) / kept


def set_dropout(
    model: Molmo2ForConditionalGeneration, *, residual: float, response: float
) -> Positions | None:
    """Give the decoder's layers their dropout; Positions to be set where it looks at them.

    With `response` 0 there is one dropout for all positions.
    """
    positions = Positions()
    for block in model.model.transformer.blocks:
        block.dropout = (
            TokenDropout(residual, response, positions) if response else nn.Dropout(residual)
        )
    return positions if response else None
