"""Which parameters are trained: frozen by pattern, counted by group.

Knows: names of parameters. Does not know: optimizers, adapters (`lora`). Source of the named parts:
the switches of Molmo2's training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import nn

from molmo_core.errors import TrainingError
from molmo_training.optim import GroupName, group_of

EMBEDDING, HEAD, FINAL_NORM = (
    "model.transformer.wte.embedding",
    "lm_head.weight",
    "model.transformer.ln_f.weight",
)
LLM = ("model.transformer.blocks.*", EMBEDDING, FINAL_NORM, HEAD)
VIT = ("model.vision_backbone.image_vit.*",)
CONNECTOR = (
    "model.vision_backbone.image_pooling_2d.*",
    "model.vision_backbone.image_projector.*",
    "model.transformer.wte.new_embedding",
)
_N_NEAR = 3
_NUMBER = re.compile(r"\d+")
_FROZEN_ENDS = {
    "lm_head": (EMBEDDING,),
    "ln_f": (EMBEDDING, HEAD),
    "wte": (FINAL_NORM, HEAD),
    "all": (),
}
"""What of the decoder's two ends stays as it is."""


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """The switches of Molmo2's training, by their names there."""

    ft_llm: bool = True
    ft_vit: bool = True
    ft_connector: bool = True
    """Also the embeddings of the extra tokens."""
    ft_embedding: Literal["lm_head", "ln_f", "wte", "all"] = "lm_head"
    """Of embedding, last norm and head: "lm_head" trains the last two, "ln_f" the norm alone, "wte"
    the embedding alone."""

    def frozen(self, *, has_tied_head: bool = False) -> tuple[str, ...]:
        """Patterns for `freeze`. A head that is the embedding is frozen or trained with it.

        `OpenedCheckpoint.has_tied_head` tells, of what the training begins with.
        """
        patterns: tuple[str, ...] = () if self.ft_llm else LLM
        patterns += () if self.ft_vit else VIT
        patterns += () if self.ft_connector else CONNECTOR
        if self.ft_llm:
            ends: tuple[str, ...] = _FROZEN_ENDS[self.ft_embedding]
            if has_tied_head:
                both = (EMBEDDING, HEAD) if EMBEDDING in ends else ()
                ends = (*both, *(end for end in ends if end not in (EMBEDDING, HEAD)))
            patterns += ends
        return patterns


@dataclass(frozen=True, kw_only=True)
class GroupCount:
    """Numbers of parameters of a group of the optimizer."""

    group: str
    n_trained: int
    n_frozen: int


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[GroupCount]:
    """Freeze the parameters that the patterns (`*`, `?`) match; the others stay as they are.

    Returns the counts. Raises TrainingError for a pattern that matches nothing.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in matching(patterns, named, what="parameter"):
        named[name].requires_grad_(False)
    return count_parameters(model)


def matching(patterns: Sequence[str], names: Iterable[str], *, what: str) -> list[str]:
    """The names that any of the patterns matches, in order.

    `*` stands for anything, dots as well. Raises TrainingError for a pattern that matches nothing;
    `what` says in its message what the names are of.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainingError(
                f"no {what} is called {pattern!r}; near it are {_near(pattern, names)}: * stands "
                "for any letters"
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def count_parameters(model: nn.Module) -> list[GroupCount]:
    """Trained and frozen numbers of the decoder, the connector and the vision tower."""
    counts = {group: [0, 0] for group in get_args(GroupName)}
    for name, parameter in model.named_parameters():
        counts[group_of(name)][parameter.requires_grad] += parameter.numel()
    return [
        GroupCount(group=group, n_trained=trained, n_frozen=frozen)
        for group, (frozen, trained) in counts.items()
    ]


def store_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keep the frozen weights of linear layers in `dtype`; returns the bytes saved.

    Under autocast to that type results stay the same bit by bit, for autocast would cast the
    same numbers; without autocast such a layer takes inputs of that type only.
    """
    n_saved = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    n_saved += parameter.numel() * (parameter.itemsize - dtype.itemsize)
                    parameter.data = parameter.data.to(dtype)
    return n_saved


def _near(pattern: str, names: list[str]) -> str:
    """Names like the pattern, of each numbered layer once."""
    shown = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
    near = get_close_matches(_NUMBER.sub("*", pattern), shown, n=_N_NEAR, cutoff=0.3)
    return ", ".join(repr(name) for name in near or shown[:_N_NEAR])
