"""Weights brought into a model that has none yet, one tensor at a time, to each rank its part.

Rank 0 reads what is split over ranks and hands out the parts, so that no machine holds more of them
than one tensor; what is not split every rank reads for itself.

Knows: meta tensors, DTensors, checkpoints' weights, adapters. Does not know: how a model is split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.weight_files import Weights
from molmo_training.lora import LORA_A, LORA_B, LoraLinear
from molmo_training.runs.ranks import Ranks


def fill(model: Molmo2ForConditionalGeneration, weights: Weights, device: torch.device) -> None:
    """Put a model on the meta device, split or not, onto `device` with these weights.

    Adapters are as at their start. Do this before the optimizer is made: parameters are new ones.
    Raises CheckpointError, on all ranks.
    """
    is_tied = model.lm_head.weight is model.model.transformer.wte.embedding
    model.to_empty(device=device)
    if is_tied:
        model.lm_head.weight = model.model.transformer.wte.embedding
    sources: dict[str, Callable[[], Tensor]] = {
        name: partial(weights.read, name) for name in weights.shapes()
    }
    for layer, module in model.named_modules():
        if isinstance(module, LoraLinear):
            sources[f"{layer}.{LORA_A}"] = module.initial_a
            sources[f"{layer}.{LORA_B}"] = partial(torch.zeros, ())
    ranks = Ranks()
    for name, parameter in model.named_parameters():
        _put(parameter, sources[name], ranks)


@torch.no_grad()
def _put(into: Tensor, read: Callable[[], Tensor], ranks: Ranks) -> None:
    if not isinstance(into, DTensor):
        into.copy_(read())
        return
    own = into.to_local()
    whole = torch.empty(into.shape, dtype=into.dtype, device=own.device)
    ranks.on_first(lambda: _fill_with(whole, read))
    parts = distribute_tensor(whole, into.device_mesh, into.placements)
    own.copy_(parts.to_local())


def _fill_with(tensor: Tensor, read: Callable[[], Tensor]) -> None:
    tensor.copy_(read())
