"""What a rank takes of memory in a step, by counting what is kept for the backward pass.

What libraries hold for themselves, allocators leave unused and workers read ahead comes on top.
Knows: which numbers of a layer torch keeps, sizes, how a step is computed. Does not know: weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from molmo_training.compute import device_of
from molmo_training.forward import DENSE_UP_TO
from molmo_training.launch.plan import Plan

_WIDE, _NARROW = 4, 2
"""Bytes of a number in float32 and in bfloat16."""
_OPTIMIZER_COPIES = 2
_GUIDE_COPIES = 12
"""Tables of all pairs that the attention guide of object lessons makes: four of each head."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes."""

    held: float
    """Weights, gradients, states of the optimizer."""
    activations: float
    """Of a full batch, at their peak."""

    @property
    def together(self) -> float:
        return self.held + self.activations


def estimated(plan: Plan, n_ranks: int = 1) -> Memory:
    """Of one of so many ranks."""
    config, counts = plan.config, plan.counts
    trained, frozen = sum(c.n_trained for c in counts), sum(c.n_frozen for c in counts)
    n_parts = n_ranks / config.parallel.replicas if config.parallel.shard == "fsdp" else 1
    held = (trained * (2 + _OPTIMIZER_COPIES) + frozen) * _WIDE / n_parts
    layers = [_decoder(plan), _tower(plan)]
    if config.compute.activation_checkpointing:
        kept = sum(layer.n * layer.entered for layer in layers)
        kept += max(layer.inside for layer in layers)
    else:
        kept = sum(layer.n * layer.inside for layer in layers)
    return Memory(held=held, activations=kept + _ends(plan))


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """Layers of one kind, and bytes that each keeps."""

    n: int
    entered: float
    """What goes into it."""
    inside: float
    """All that its backward pass needs."""


def _decoder(plan: Plan) -> _Layers:
    text, data, width = plan.start.config.text_config, plan.config.data, _width(plan)
    n_whole = data.budgets.n_tokens * data.packs_per_batch
    n_tokens = n_whole / plan.config.parallel.context_degree
    d, ff = text.hidden_size, text.intermediate_size
    heads = (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    a_token = (4 * d) * _WIDE + 3 * heads * _attended(plan) + (5 * d + heads + 4 * ff) * width
    return _Layers(
        n=text.num_hidden_layers,
        entered=n_tokens * d * _WIDE,
        inside=n_tokens * a_token + _mask(plan),
    )


def _tower(plan: Plan) -> _Layers:
    model, vit, width = plan.start.config, plan.start.config.vit_config, _width(plan)
    d, ff, n = vit.hidden_size, vit.intermediate_size, vit.num_hidden_layers
    a_patch = 4 * d * _attended(plan) + (5 * d + 2 * ff) * width
    return _Layers(
        n=1 + max(k % n for k in model.adapter_config.vit_layers),
        entered=_n_patches(plan) * d * _WIDE,
        inside=_n_patches(plan) * a_patch,
    )


def _ends(plan: Plan) -> float:
    """Pixels, what is pooled, the logits of one chunk, tables of the object lessons."""
    config, model, data = plan.config, plan.start.config, plan.config.data
    vit = model.vit_config
    n_used = len(model.adapter_config.vit_layers)
    a_patch = vit.image_patch_size**2 * 3 * _WIDE
    a_patch += 2 * (n_used + 1) * vit.hidden_size * _width(plan)
    chunk = min(config.loss.chunk_size, data.budgets.n_tokens * data.packs_per_batch)
    tables = _GUIDE_COPIES * _pairs(plan) if config.model.object_lessons else 0
    logits = 3 * chunk * model.text_config.vocab_size
    return float(_n_patches(plan) * a_patch + (logits + tables) * _WIDE)


def _n_patches(plan: Plan) -> float:
    rows, columns = plan.start.config.vit_config.image_num_patch
    data = plan.config.data
    n_crops = data.budgets.n_crops * data.packs_per_batch / plan.config.parallel.context_degree
    return float(n_crops * rows * columns)


def _pairs(plan: Plan) -> int:
    return int(plan.config.data.packs_per_batch * plan.config.data.budgets.n_tokens**2)


def _mask(plan: Plan) -> float:
    """A table of all pairs, where attention has one: torch keeps it as numbers, for each layer."""
    config = plan.config
    is_short = config.data.budgets.n_tokens <= DENSE_UP_TO
    is_dense = config.compute.attention == "dense" or config.model.object_lessons
    if not is_dense and not (config.compute.attention == "auto" and is_short):
        return 0
    return _pairs(plan) * _attended(plan)


def _width(plan: Plan) -> int:
    return _NARROW if plan.config.compute.autocast_bf16 else _WIDE


def _attended(plan: Plan) -> int:
    """Bytes of a number in attention, which a CPU computes in float32 also under autocast."""
    is_on_cpu = device_of(plan.config.compute).type == "cpu"
    return _WIDE if is_on_cpu else _width(plan)
