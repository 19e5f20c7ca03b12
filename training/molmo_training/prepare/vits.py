"""Pretrained vision towers as Molmo2's: SigLIP, SigLIP2, CLIP (OpenAI's, MetaCLIP), DINOv2.

The tower takes pixels in −1…1, patches in the order (row, column, channel), and has neither layer
scale nor final norm. What differs is worked into the weights, and the function stays the same:

* another mean and deviation of pixels, into the patch embedding;
* layer scale, into the projection that it stands behind;
* the class token's position, into the class token;
* positions of another grid, by bicubic interpolation.

Knows: configurations and tensor names in transformers. Does not know: files, the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_hf.configuration_molmo2 import Molmo2VitConfig
from molmo_hf.modeling_molmo2_vision import Molmo2VisionTransformer
from molmo_hf.weight_files import Weights
from molmo_training.checkpoints.weight_views import Renamed
from molmo_training.prepare.derived import Derivation, Derived, check_shapes, check_used

PREFIX = "model.vision_backbone.image_vit."
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation that pixels in 0…1 are normalised with."""

_CLIP_BLOCK = {
    "attention_norm": "layer_norm1",
    "ffn_norm": "layer_norm2",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.out_proj",
    "feed_forward.w1": "mlp.fc1",
    "feed_forward.w2": "mlp.fc2",
}
_DINO_BLOCK = {
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "attention.wq": "attention.attention.query",
    "attention.wk": "attention.attention.key",
    "attention.wv": "attention.attention.value",
    "attention.wo": "attention.output.dense",
    "feed_forward.w1": "mlp.fc1",
    "feed_forward.w2": "mlp.fc2",
}
_TEXT_SIDE = ("text_model.*", "text_projection.*", "visual_projection.*", "logit_*")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a kind of tower is written in transformers."""

    block: Mapping[str, str]
    """Names of a layer's parts, ours → theirs."""
    layers: str
    patches: str
    positions: str
    pixels: Pixels
    class_token: str | None = None
    pre_norm: str | None = None
    scales: Mapping[str, str]
    """Ours → the layer scale behind it."""
    has_patch_bias: bool = True
    unused: tuple[str, ...]


_CLIP = Family(
    block=_CLIP_BLOCK,
    layers="encoder.layers",
    patches="embeddings.patch_embedding",
    positions="embeddings.position_embedding.weight",
    pixels=_OPENAI,
    class_token="embeddings.class_embedding",
    pre_norm="pre_layrnorm",  # the spelling of transformers
    scales={},
    has_patch_bias=False,
    unused=("post_layernorm.*", "embeddings.position_ids", *_TEXT_SIDE),
)
FAMILIES = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": replace(
        _CLIP,
        pixels=_HALF,
        class_token=None,
        pre_norm=None,
        has_patch_bias=True,
        unused=("head.*", *_CLIP.unused),
    ),
    "dinov2": Family(
        block=_DINO_BLOCK,
        layers="encoder.layer",
        patches="embeddings.patch_embeddings.projection",
        positions="embeddings.position_embeddings",
        pixels=_IMAGENET,
        class_token="embeddings.cls_token",
        scales={"attention.wo": "layer_scale1.lambda1", "feed_forward.w2": "layer_scale2.lambda1"},
        unused=("layernorm.*", "embeddings.mask_token", "classifier.*"),
    ),
}
_PREFIXES = ("vision_model.", "dinov2.")


def vision_config_of(config: Any) -> Any | None:
    """The tower's own part of a configuration of transformers; None where it has no tower."""
    config = getattr(config, "vision_config", config)
    return config if config.model_type in FAMILIES else None


def vit_config_of(
    config: Any, *, input_px: int | None = None, n_layers: int | None = None
) -> Molmo2VitConfig:
    """Our configuration of the tower `config`, which may see crops of another side.

    Raises CheckpointError for what the tower cannot compute, and for a side that is no multiple of
    the patch.
    """
    family = FAMILIES[config.model_type]
    patch_px, n_all = config.patch_size, config.num_hidden_layers
    side_px = input_px or config.image_size // patch_px * patch_px
    if not isinstance(side_px, int) or not isinstance(patch_px, int) or side_px % patch_px:
        raise CheckpointError(
            f"crops of {side_px} px do not divide into patches of {patch_px} px; choose a multiple"
        )
    if getattr(config, "use_swiglu_ffn", False) or not getattr(config, "qkv_bias", True):
        raise CheckpointError(
            "this DINOv2 has a gated MLP or no biases; the tower knows the plain one (small, base, "
            "large)"
        )
    if n_layers is not None and not 1 <= n_layers <= n_all:
        raise CheckpointError(f"{n_layers} layers are asked for; the tower has {n_all}")
    width, n_heads = config.hidden_size, config.num_attention_heads
    ratio = getattr(config, "mlp_ratio", None)
    return Molmo2VitConfig(
        hidden_size=width,
        intermediate_size=config.intermediate_size if ratio is None else int(width * ratio),
        num_hidden_layers=n_layers or n_all,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=width // n_heads,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        image_default_input_size=(side_px, side_px),
        image_patch_size=patch_px,
        image_num_pos=(side_px // patch_px) ** 2,
        class_token=family.class_token is not None,
        pre_norm=family.pre_norm is not None,
    )


def vit_weights(
    weights: Weights, theirs: Any, config: Molmo2VitConfig, pixels: Pixels | None = None
) -> Weights:
    """The tensors of the tower that `theirs` configures, as `config` has them.

    `pixels` None: as the family has them. Raises CheckpointError.
    """
    family = FAMILIES[theirs.model_type]
    plain = Renamed(weights, {_plain(name): name for name in weights.shapes()})
    derivations = {PREFIX + name: d for name, d in _derivations(family, config, pixels).items()}
    beyond = tuple(
        f"{family.layers}.{k}.*" for k in range(config.num_hidden_layers, theirs.num_hidden_layers)
    )
    check_used(plain, derivations, family.unused + beyond)
    derived = Derived(plain, derivations)
    check_shapes(derived, vit_shapes(config))
    return derived


def vit_shapes(config: Molmo2VitConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tower = Molmo2VisionTransformer(config, list(range(config.num_hidden_layers)))
    return {PREFIX + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}


def _derivations(
    family: Family, config: Molmo2VitConfig, pixels: Pixels | None
) -> dict[str, Derivation]:
    kernel, mean_std = f"{family.patches}.weight", pixels or family.pixels
    bias = (f"{family.patches}.bias",) if family.has_patch_bias else ()
    n_front = 0 if family.class_token is None else 1
    made = {
        "patch_embedding.weight": Derivation((kernel,), partial(_patch_weight, pixels=mean_std)),
        "patch_embedding.bias": Derivation((kernel, *bias), partial(_patch_bias, pixels=mean_std)),
        "positional_embedding": Derivation(
            (family.positions,),
            partial(resized_positions, n_front=n_front, size=config.image_num_patch),
        ),
    }
    if family.class_token is not None:
        made["class_embedding"] = Derivation((family.class_token, family.positions), _class_token)
    if family.pre_norm is not None:
        made |= {f"pre_ln.{k}": Derivation((f"{family.pre_norm}.{k}",)) for k in ("weight", "bias")}
    for layer in range(config.num_hidden_layers):
        old, new = f"{family.layers}.{layer}.", f"transformer.resblocks.{layer}."
        for ours, theirs in family.block.items():
            scale = family.scales.get(ours)
            for kind in ("weight", "bias"):
                source = (f"{old}{theirs}.{kind}",)
                made[f"{new}{ours}.{kind}"] = (
                    Derivation(source)
                    if scale is None
                    else Derivation((*source, old + scale), _scaled)
                )
    return made


def _patch_weight(kernel: Tensor, *, pixels: Pixels) -> Tensor:
    """(D, 3, rows, columns) → (D, rows · columns · 3), for pixels in −1…1."""
    _, std = pixels
    scaled = kernel.double() / (2 * _channels(std, kernel))
    return scaled.permute(0, 2, 3, 1).flatten(1).to(_at_least_float32(kernel))


def _patch_bias(kernel: Tensor, bias: Tensor | None = None, *, pixels: Pixels) -> Tensor:
    """What the middle of the range, 0 here, is there: (0.5 − mean) / deviation."""
    mean, std = pixels
    middle = (0.5 - _channels(mean, kernel)) / _channels(std, kernel)
    added = (kernel.double() * middle).sum(dim=(1, 2, 3))
    if bias is not None:
        added = added + bias.double()
    return added.to(_at_least_float32(kernel))


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).view(1, 3, 1, 1)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def resized_positions(table: Tensor, *, n_front: int, size: tuple[int, int]) -> Tensor:
    """Positions ((1,) n_front + side², D) → (rows · columns, D) of the patches alone.

    Interpolated as DINOv2 and CLIP do themselves where they see another size.
    """
    patches = table.flatten(0, -2)[n_front:]
    side = round(patches.shape[0] ** 0.5)
    if (side, side) == tuple(size):
        return patches
    grid = patches.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)


def _class_token(token: Tensor, positions: Tensor) -> Tensor:
    return token.flatten() + positions.flatten(0, -2)[0]


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """A row, or a bias, is an output that layer scale multiplies."""
    return tensor * scale.view(-1, *[1] * (tensor.dim() - 1))


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
