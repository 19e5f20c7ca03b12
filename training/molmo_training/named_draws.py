"""Random numbers that depend on a seed and a name, not on what was drawn before.

Knows: nothing but that. Does not know: what the numbers are for.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def draw_normal(shape: tuple[int, ...], *, std: float, seed: int, name: str) -> Tensor:
    """Float32 numbers on the CPU, of mean 0 and deviation `std`."""
    # torch reads 32 bits of a seed on the CPU: number and name have to share them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator) * std
