"""Parameter groups and learning-rate schedules.

Knows: which parameters belong to the decoder, the connector and the vision tower.
Does not know: losses, data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with one cosine a group of parameters; rates are peaks."""

    llm_lr: float = 1.5e-3
    connector_lr: float = 1.5e-3
    vit_lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 200
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Clipped per group, as in Molmo2's training."""


def group_of(name: str) -> str:
    """The group of a parameter: "vit", "connector" or "llm"."""
    if "image_vit" in name:
        return "vit"
    if "vision_backbone" in name or "new_embedding" in name:
        return "connector"
    return "llm"


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    rates = {"llm": config.llm_lr, "connector": config.connector_lr, "vit": config.vit_lr}
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    groups = [
        {
            "params": [p for n, p in named if group_of(n) == group],
            "lr": lr,
            "peak": lr,
            "name": group,
        }
        for group, lr in rates.items()
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float, step: int
) -> float:
    """Warm up linearly, then follow a cosine over `progress` (0…1). Returns the factor."""
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    else:
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        factor = config.final_fraction + (1 - config.final_fraction) * cosine
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return factor


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> dict[str, float]:
    """Clip each group's gradient by its own norm; returns the norms."""
    return {
        group["name"]: float(nn.utils.clip_grad_norm_(group["params"], max_norm))
        for group in optimizer.param_groups
    }
