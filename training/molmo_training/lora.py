"""LoRA: small matrices beside the linear layers of a model whose own weights stay as they are.

A layer keeps its name and its `weight`; `lora_a` (rank, inputs) and `lora_b` (outputs, rank) stand
beside it as ordinary parameters, fused projections included. So optimizers, FSDP2 and distributed
checkpoints see nothing special.

Knows: modules and parameters. Does not know: files and merging (`checkpoints.adapters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_core.errors import TrainingError
from molmo_training.freezing import GroupCount, count_parameters, matching
from molmo_training.named_draws import draw_normal

LORA_A, LORA_B = "lora_a", "lora_b"
HEAD_MODULE = "lm_head"
DECODER = ("model.transformer.blocks.*",)
CONNECTOR = (
    "model.vision_backbone.image_pooling_2d.*",
    "model.vision_backbone.image_projector.*",
)
TOWER = ("model.vision_backbone.image_vit.transformer.*",)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    """What the adapters add is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: tuple[str, ...] = DECODER + CONNECTOR
    """Patterns of linear layers that get adapters; add `TOWER` for the vision tower."""
    trained: tuple[str, ...] = ()
    """Patterns of parameters that are trained whole beside the adapters."""

    def __post_init__(self) -> None:
        """Raise TrainingError for numbers that make no adapter."""
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise TrainingError(
                f"LoRA has rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g}; "
                "allowed are ranks from 1, an alpha above 0 and a dropout from 0 to below 1"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; it computes what `linear` did as long as `lora_b` is zero."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, *, name: str, seed: int) -> None:
        nn.Module.__init__(self)  # the weights of `linear` are taken over, not made anew
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        std = (3 * linear.in_features) ** -0.5
        shape = (config.rank, linear.in_features)
        self.initial_a = partial(draw_normal, shape, std=std, seed=seed, name=name)
        """Makes `lora_a` as it starts, on the CPU; `lora_b` starts as zeros."""
        device = linear.weight.device
        self.lora_a = nn.Parameter(self.initial_a().to(device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + added * self.scale


def add_adapters(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[GroupCount]:
    """Put adapters on the linear layers that `config.targets` match and freeze all the rest.

    Parameters that `config.trained` match stay trained. Done once, before sharding; what the model
    computes does not change. Returns the counts. Raises TrainingError for a pattern that matches
    nothing, for adapters on the language head (its loss is computed from the weight itself), and
    for a layer that would be trained both ways.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if any(isinstance(m, LoraLinear) for m in linears.values()):
        raise TrainingError("the model has adapters already; load into those with load_adapters")
    chosen = matching(config.targets, linears, what="linear layer")
    if HEAD_MODULE in chosen:
        raise TrainingError(
            f"{HEAD_MODULE!r} can have no adapter; train it whole (trained = '{HEAD_MODULE}.*') or "
            "leave it out of the targets"
        )
    named = dict(model.named_parameters())
    whole = set(matching(config.trained, named, what="parameter"))
    if twice := [name for name in chosen if whole & {f"{name}.weight", f"{name}.bias"}]:
        raise TrainingError(
            f"{twice[0]!r} would have an adapter and be trained whole; leave it out of one of them"
        )
    for name, parameter in named.items():
        parameter.requires_grad_(name in whole)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        adapted = LoraLinear(linears[name], config, name=name, seed=seed)
        setattr(model.get_submodule(parent), leaf, adapted)
    return count_parameters(model)
