"""Parameter groups, the optimizers that step them, learning-rate schedules, clipping.

Knows: which parameters belong to the decoder, the connector and the vision tower, and which of
them are matrices of layers; parameters may be sharded (DTensor). Does not know: losses, data.
Source: optimizer, schedule and clipping of Molmo2's training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from molmo_core.errors import TrainingError

GroupName = Literal["llm", "connector", "vit"]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """How one group of parameters is stepped."""

    lr: float
    """The highest rate: that at the end of the warm-up."""
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    """Gradients of the group are scaled down to this norm, whatever those of the others are."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the defaults are those that all released stages share."""

    llm: GroupConfig = field(default_factory=lambda: GroupConfig(lr=1e-5))
    connector: GroupConfig = field(default_factory=lambda: GroupConfig(lr=5e-6))
    vit: GroupConfig = field(default_factory=lambda: GroupConfig(lr=5e-6))
    muon: bool = False
    """Step the matrices of layers with Muon (at AdamW's step size), the rest with AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    """Not of tables, norms and the tower's ends, see `is_decayed`."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the highest."""

    def of(self, group: str) -> GroupConfig:
        config: GroupConfig = getattr(self, group)
        return config


def group_of(name: str) -> GroupName:
    """The group of a parameter, by its name in the model."""
    if "image_vit" in name:
        return "vit"
    if "vision_backbone" in name or "new_embedding" in name:
        return "connector"
    return "llm"


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for it: it maps features to features (no table, no ends)."""
    inside = "blocks." in name or "image_pooling_2d" in name or "image_projector" in name
    return inside and parameter.ndim == 2


_NEVER_DECAYED = ("wte", "_norm", "ln_f", "pre_ln", "lambda", "_embedding")


def is_decayed(name: str) -> bool:
    """Whether weight decay, where there is any, is meant for the parameter."""
    return not any(part in name for part in _NEVER_DECAYED)


def rate_at(config: GroupConfig, t: int, n_steps: int, *, final: float, time_used: float) -> float:
    """The rate of optimizer step `t` (1…n_steps): linear from 0, then a cosine to `final` · lr.

    `time_used` is the part of a run's time limit that is over (0 without one): the cosine follows
    whichever is further on, so that a run cut by time ends with a small rate.
    """
    if t < config.warmup_steps:
        return config.lr * t / config.warmup_steps
    length = max(n_steps - config.warmup_steps, 1)
    done = min(max((t - config.warmup_steps) / length, time_used), 1.0)
    last = config.lr * final
    return last + (config.lr - last) * (1 + math.cos(math.pi * done)) / 2


class Optimizer:
    """One or two torch optimizers stepped as one, with groups "llm", "connector" and "vit".

    Every parameter that is trained is in exactly one group. Raises TrainingError without any.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        trained = sorted((n, p) for n, p in named if p.requires_grad)
        if not trained:
            raise TrainingError("no parameter is trained: freeze fewer of them")
        matrices = [(n, p) for n, p in trained if config.muon and is_layer_matrix(n, p)]
        chosen = {n for n, _ in matrices}
        rest = [(n, p) for n, p in trained if n not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        """The torch optimizers, for whoever saves them."""
        if rest:
            adamw = torch.optim.AdamW(
                _groups(rest, config), betas=config.betas, eps=config.eps, fused=True
            )
            self.parts.append(adamw)
        if matrices:
            muon = torch.optim.Muon(_groups(matrices, config), adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)

    @property
    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The parameter groups by name; loading a state replaces them, so ask anew."""
        named: dict[str, list[dict[str, Any]]] = {}
        for part in self.parts:
            for group in part.param_groups:
                named.setdefault(group["name"], []).append(group)
        return named

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for groups in self.groups.values() for group in groups for p in group["params"]]

    def set_rates(self, t: int, n_steps: int, *, time_used: float = 0.0) -> dict[str, float]:
        """Set the rates of optimizer step `t`, see `rate_at`. Returns them by group."""
        rates = {}
        for name, groups in self.groups.items():
            rates[name] = rate_at(
                self.config.of(name),
                t,
                n_steps,
                final=self.config.final_fraction,
                time_used=time_used,
            )
            for group in groups:
                group["lr"] = rates[name]
        return rates

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> dict[str, float]:
        """Clip each group by its own norm, step. Returns the norms before that: by group, "total".

        Raises TrainingError, before any parameter is changed, when a norm is not finite.
        """
        norms: dict[str, Tensor] = {}
        for name, groups in self.groups.items():
            held = [p for group in groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
            nn.utils.clip_grads_with_norm_(held, self.config.of(name).max_grad_norm, norms[name])
        found = {name: float(norm) for name, norm in norms.items()}
        if wrong := [name for name, norm in found.items() if not math.isfinite(norm)]:
            raise TrainingError(
                f"the gradients of {', '.join(wrong)} are not finite: lower the rates, or leave "
                "out the examples of this step"
            )
        for part in self.parts:
            part.step()
        return found | {"total": math.hypot(*found.values())}


def _groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """For each name a group of what is decayed and one of what is not; empty ones left out."""
    groups = []
    for name in get_args(GroupName):
        mine = [(n, p) for n, p in named if group_of(n) == name]
        decayed = [p for n, p in mine if config.weight_decay and is_decayed(n)]
        others = [p for n, p in mine if not (config.weight_decay and is_decayed(n))]
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0)):
            if parameters:
                rate = config.of(name).lr
                group = {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
                groups.append(group)
    return groups
