"""Parameter groups, the optimizers that step them, learning-rate schedules.

Knows: which parameters belong to the decoder, the connector and the vision tower, and which of
them are matrices of layers. Does not know: losses, data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One schedule for all; rates are peaks, a group of parameters each."""

    llm_lr: float = 1.5e-3
    connector_lr: float = 1.5e-3
    vit_lr: float = 1.5e-3
    muon: bool = False
    """Step the matrices of layers with Muon (at AdamW's step size), the rest with AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 200
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Clipped per group, as in Molmo2's training."""

    @property
    def rates(self) -> dict[str, float]:
        return {"llm": self.llm_lr, "connector": self.connector_lr, "vit": self.vit_lr}


def group_of(name: str) -> str:
    """The group of a parameter: "vit", "connector" or "llm"."""
    if "image_vit" in name:
        return "vit"
    if "vision_backbone" in name or "new_embedding" in name:
        return "connector"
    return "llm"


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for it: it maps features to features (no table, no ends)."""
    inside = "blocks." in name or "image_pooling_2d" in name or "image_projector" in name
    return inside and parameter.ndim == 2


class Optimizer:
    """One or two torch optimizers stepped as one, with groups "llm", "connector" and "vit"."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        trained = sorted((n, p) for n, p in named if p.requires_grad)
        matrices = [(n, p) for n, p in trained if config.muon and is_layer_matrix(n, p)]
        chosen = {n for n, _ in matrices}
        rest = [(n, p) for n, p in trained if n not in chosen]
        self._parts: list[torch.optim.Optimizer] = []
        if rest:
            adamw = torch.optim.AdamW(
                _groups(rest, config),
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
            self._parts.append(adamw)
        if matrices:
            muon = torch.optim.Muon(
                _groups(matrices, config),
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append(muon)

    @property
    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The parameter groups by name; loading a state replaces them, so ask anew."""
        named: dict[str, list[dict[str, Any]]] = {}
        for part in self._parts:
            for group in part.param_groups:
                named.setdefault(group["name"], []).append(group)
        return named

    def set_rate(self, progress: float, step: int) -> float:
        """Warm up linearly, then follow a cosine over `progress` (0…1). Returns the factor."""
        if step < self.config.warmup_steps:
            factor = (step + 1) / self.config.warmup_steps
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            factor = self.config.final_fraction + (1 - self.config.final_fraction) * cosine
        for name, groups in self.groups.items():
            for group in groups:
                group["lr"] = self.config.rates[name] * factor
        return factor

    def step(self, loss: Tensor) -> dict[str, float]:
        """Backward, clip each group by its own norm, step. Returns the norms by name."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norms = {
            name: float(
                nn.utils.clip_grad_norm_(
                    [p for group in groups for p in group["params"]], self.config.max_grad_norm
                )
            )
            for name, groups in self.groups.items()
        }
        for part in self._parts:
            part.step()
        return norms

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def _groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for n, p in named if group_of(n) == name], "lr": rate, "name": name}
        for name, rate in config.rates.items()
    ]
    return [group for group in groups if group["params"]]
