"""Pretrained language models as Molmo2's decoder: Qwen3 and OLMo3.

Knows: their configurations and tensor names in transformers, and what of them the decoder cannot
compute, which is refused. Does not know: files, tokenizers, the tower.
Source: spec of Molmo2's conversion of language models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_hf.configuration_molmo2 import Molmo2TextConfig
from molmo_hf.export import EMBEDDING, HEAD
from molmo_hf.modeling_molmo2 import Molmo2Decoder
from molmo_hf.weight_files import Weights
from molmo_training.checkpoints.weight_views import Renamed
from molmo_training.prepare.derived import Derivation, Derived, check_shapes, check_used

NEW_EMBEDDING = "model.transformer.wte.new_embedding"
_PREFIX = "model."
_NORMS = {
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Names of the norms of attention and MLP; OLMo3's stand behind them."""
LLM_TYPES = tuple(_NORMS)
_UNUSED = ("*.rotary_emb.inv_freq",)
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
}
"""Field → the values that the decoder computes with; None: the field is absent."""


def text_config_of(config: Any) -> Molmo2TextConfig:
    """The decoder's configuration. Raises CheckpointError for what it cannot compute.

    OLMo3's sliding windows become full attention, as in Molmo2's training.
    """
    for field, allowed in _ONLY.items():
        if (value := getattr(config, field, None)) not in allowed:
            raise CheckpointError(
                f"{field} of the language model is {value!r}; the decoder knows {list(allowed)}"
            )
    rope, scaled_layers = _rope(config)
    is_olmo = config.model_type == "olmo3"
    return Molmo2TextConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        qkv_bias=False,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        hidden_act="silu",
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        rope_scaling_layers=scaled_layers,
        use_qk_norm=True,
        qk_norm_type="olmo" if is_olmo else "qwen3",
        layer_norm_eps=config.rms_norm_eps,
        norm_after=is_olmo,
        initializer_range=config.initializer_range,
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )


def _rope(config: Any) -> tuple[dict[str, Any], list[int] | None]:
    """Rope as the decoder has it, and the layers that are scaled (None: all of them)."""
    rope = config.rope_parameters
    layers = None
    if "full_attention" in rope:  # a kind for each kind of layer
        if rope["sliding_attention"] != {
            "rope_type": "default",
            "rope_theta": rope["full_attention"]["rope_theta"],
        }:
            raise CheckpointError(
                f"rope of sliding layers is {rope['sliding_attention']}; the decoder knows the "
                "unscaled one with the base of the other layers"
            )
        rope = rope["full_attention"]
        if rope["rope_type"] != "default":
            layers = [k for k, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if rope["rope_type"] not in ("default", "yarn"):
        raise CheckpointError(
            f"rope_type is {rope['rope_type']!r}; the decoder knows 'default' and 'yarn'"
        )
    return dict(rope), layers


def llm_weights(weights: Weights, model_type: str, config: Molmo2TextConfig) -> Weights:
    """The decoder's tensors but the new rows; a tied head is left out. Raises CheckpointError."""
    plain = Renamed(weights, {name.removeprefix(_PREFIX): name for name in weights.shapes()})
    derivations = _derivations(model_type, config)
    unused = (*_UNUSED, HEAD) if config.tie_word_embeddings else _UNUSED
    check_used(plain, derivations, unused)
    derived = Derived(plain, derivations)
    check_shapes(derived, llm_shapes(config))
    return derived


def llm_shapes(config: Molmo2TextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        decoder = Molmo2Decoder(config)
    shapes = {
        f"{_PREFIX}transformer.{name}": tuple(tensor.shape)
        for name, tensor in decoder.state_dict().items()
    }
    del shapes[NEW_EMBEDDING]
    if not config.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    return shapes


def _derivations(model_type: str, config: Molmo2TextConfig) -> dict[str, Derivation]:
    made = {
        EMBEDDING: Derivation(("embed_tokens.weight",)),
        "model.transformer.ln_f.weight": Derivation(("norm.weight",)),
    }
    if not config.tie_word_embeddings:
        made[HEAD] = Derivation((HEAD,))
    attention_norm, mlp_norm = _NORMS[model_type]
    for layer in range(config.num_hidden_layers):
        old, new = f"layers.{layer}.", f"model.transformer.blocks.{layer}."
        attention, mlp = f"{old}self_attn.", f"{old}mlp."
        made |= {
            f"{new}attn_norm.weight": Derivation((f"{old}{attention_norm}.weight",)),
            f"{new}ff_norm.weight": Derivation((f"{old}{mlp_norm}.weight",)),
            f"{new}self_attn.att_proj.weight": Derivation(
                tuple(f"{attention}{part}_proj.weight" for part in "qkv"), _stacked
            ),
            f"{new}self_attn.attn_out.weight": Derivation((f"{attention}o_proj.weight",)),
            f"{new}self_attn.q_norm.weight": Derivation((f"{attention}q_norm.weight",)),
            f"{new}self_attn.k_norm.weight": Derivation((f"{attention}k_norm.weight",)),
            f"{new}mlp.ff_proj.weight": Derivation(
                (f"{mlp}up_proj.weight", f"{mlp}gate_proj.weight"), _stacked
            ),
            f"{new}mlp.ff_out.weight": Derivation((f"{mlp}down_proj.weight",)),
        }
    return made


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
