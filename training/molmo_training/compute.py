"""How a step is computed: device, precision, memory against time. None of it is what is learnt.

Knows: the parts of the model that are computed again or compiled on their own. Does not know:
data, losses, ranks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from molmo_core.errors import TrainingError
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.dropout import TokenDropout
from molmo_training.forward import AttentionKind


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast_bf16: bool = True
    """Products in bfloat16; weights, gradients and the optimizer stay in float32."""
    activation_checkpointing: bool = True
    """Compute blocks again in the backward pass instead of keeping what is inside them."""
    attention: AttentionKind = "auto"
    """Who sees whom as a mask of all pairs, or tile by tile; see `Forward`."""
    compile_blocks: bool | None = None
    """Compile each block, for which the first steps take minutes; None: on a GPU."""
    n_threads: int | None = None
    """Of a CPU; None: as torch chooses."""
    steps_between_collections: int | None = 1
    """Python's cyclic garbage is collected by all ranks at the same steps, so that none waits for
    another's collection; None: whenever Python likes."""


def device_of(config: ComputeConfig, local_rank: int = 0) -> torch.device:
    """Raises TrainingError where the machine lacks the device."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise TrainingError("compute.device is 'cuda' and torch sees no GPU; allowed are auto, cpu")
    if config.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def keep_few_kernels() -> None:
    """Let oneDNN forget the kernels of shapes gone by; what the environment says stays.

    Call it before the first product. Packs differ in size, and each size has kernels of its own: a
    run on a CPU grew from 3 to 7 GB in its first 500 steps. With few it is no slower.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def autocast(config: ComputeConfig, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast_bf16)


def blocks_of(model: Molmo2ForConditionalGeneration) -> list[nn.Module]:
    """The parts that hold most activations: layers of decoder and tower, pooling, projector."""
    backbone = model.model.vision_backbone
    return [
        *model.model.transformer.blocks,
        *backbone.image_vit.transformer.resblocks,
        backbone.image_pooling_2d,
        backbone.image_projector,
    ]


def prepare_blocks(model: Molmo2ForConditionalGeneration, config: ComputeConfig) -> None:
    """Change how blocks are called, in place; names of weights stay as they are."""
    is_on_gpu = next(model.parameters()).is_cuda
    compiles = is_on_gpu if config.compile_blocks is None else config.compile_blocks
    has_dropout = any(_drops(module) for module in model.modules())
    for block in blocks_of(model):
        if config.activation_checkpointing:
            block.forward = partial(
                _computed_again, block, block.forward, preserve_rng_state=has_dropout
            )
        if compiles:
            block.compile(dynamic=True)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, TokenDropout):
        return True
    return isinstance(module, nn.Dropout) and module.p > 0


def _computed_again(
    block: nn.Module,
    forward: Callable[..., Any],
    *arguments: Any,
    preserve_rng_state: bool,
    **named: Any,
) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*arguments, **named)
    return checkpoint(
        forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state, **named
    )


@contextmanager
def steady_collections(config: ComputeConfig) -> Iterator[None]:
    """Python's own collections are off inside, where the config sets the steps for them."""
    was_enabled = gc.isenabled()
    if config.steps_between_collections is not None:
        gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_at(step: int, config: ComputeConfig) -> None:
    """Young garbage at the steps of the config; the rest is rare and large, and waits."""
    every = config.steps_between_collections
    if every is not None and step % every == 0:
        gc.collect(1)
