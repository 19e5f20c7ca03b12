"""Crops as the model takes them: bytes until they are where the vision tower is.

Knows: the steps of `molmo_core.pixels.normalised`. Does not know: how pixels are cut, the model.
"""

from __future__ import annotations

from torch import Tensor


def normalised(crops: Tensor) -> Tensor:
    """Bytes → −1…1 in float32, bit by bit what `molmo_core.pixels.normalised` gives."""
    values = crops.float()
    # By a tensor: a GPU multiplies by the rounded inverse of a plain number.
    return values.div_(values.new_tensor(255)).sub_(0.5).mul_(2)
