"""Weights split over ranks (FSDP2, with replicas HSDP).

Gradients of split weights are *summed* over all ranks: a rank goes backward from its own part of
the loss of the whole step, and nothing is to be divided.

Knows: which parts of the model are gathered together. Does not know: losses, optimizers.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.parallel.mesh import Mesh


def shard_model(model: Molmo2ForConditionalGeneration, mesh: Mesh) -> None:
    """Split the weights of `model` over the mesh, in place; nothing where it is not sharded.

    Each layer of decoder and tower, pooling, projector and embedding are gathered when they run.
    The final norm and the head stay whole from the forward pass to the backward pass, for losses
    that read the head in pieces; without a backward pass `split_again` ends that.

    Do this before the optimizer is made; weights may be there already or be filled in behind it
    (`launch.filling`). `Forward` is what runs a sharded model.
    """
    over = mesh.weights_mesh
    if over is None:
        return
    # It warns of what the model does not do: change such a result in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Inputs stay as they are: rotary angles in bfloat16 would be of no use.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mesh.gather_bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    inner, last = _units(model)
    for unit in inner:
        fully_shard(unit, mesh=over, mp_policy=policy)
    fully_shard(last, mesh=over, mp_policy=policy, reshard_after_forward=False)
    for module in (*inner, last[0]):
        _sum_gradients_of(module)


def as_root(module: nn.Module, mesh: Mesh) -> None:
    """Make `module` what the sharded parts inside it are run through."""
    fully_shard(module, mesh=mesh.weights_mesh)
    _sum_gradients_of(module)


def split_again(model: Molmo2ForConditionalGeneration) -> None:
    """Split what a forward pass without a backward pass has left whole, the head.

    Until then the model's parameters are not those that the optimizer holds, and cannot be saved
    with its state.
    """
    if isinstance(model.lm_head, FSDPModule):
        model.lm_head.reshard()


def _units(model: Molmo2ForConditionalGeneration) -> tuple[list[nn.Module], list[nn.Module]]:
    """What is gathered on its own, inner parts first; what is gathered together at the end."""
    backbone, decoder = model.model.vision_backbone, model.model.transformer
    inner = [
        *backbone.image_vit.transformer.resblocks,
        backbone.image_vit,
        backbone.image_pooling_2d,
        backbone.image_projector,
        *decoder.blocks,
    ]
    if model.lm_head.weight is decoder.wte.embedding:
        return inner, [decoder.wte, decoder.ln_f, model.lm_head]
    return [*inner, decoder.wte], [decoder.ln_f, model.lm_head]


def _sum_gradients_of(module: nn.Module) -> None:
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
