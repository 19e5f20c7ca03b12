"""Small random models of transformers, saved as a hub holds them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from molmo_hf.tokenizer import train_tokenizer

N_ROWS, N_TOKENS = 320, 300
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": N_ROWS,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 128,
}
_TOWER = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 7,
}
_TEXT_SIDE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _qwen3(**fields: Any) -> PreTrainedModel:
    fields = {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True} | fields
    return Qwen3ForCausalLM(Qwen3Config(**_TEXT | fields))


def _olmo3(**fields: Any) -> PreTrainedModel:
    fields = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rope_scaling": _YARN,
        "rope_theta": 5e5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 512,  # longer than what the tests ask: as full attention
    } | fields
    return Olmo3ForCausalLM(Olmo3Config(**_TEXT | fields))


def _siglip(**fields: Any) -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(**_vision(fields)))


def _siglip_both(**fields: Any) -> PreTrainedModel:
    vision, text = _vision(fields), {**_TEXT_SIDE, "projection_size": 48}
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text))


def _clip(**fields: Any) -> PreTrainedModel:
    return CLIPVisionModel(CLIPVisionConfig(**_vision(fields)))


def _clip_both(**fields: Any) -> PreTrainedModel:
    return CLIPModel(CLIPConfig(vision_config=_vision(fields), text_config=_TEXT_SIDE))


def _dinov2(**fields: Any) -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**_TOWER | {"image_size": 42, "mlp_ratio": 2} | fields))


def _vision(fields: dict[str, Any]) -> dict[str, Any]:
    return _TOWER | {"image_size": 28, "intermediate_size": 80} | fields


_MODELS = {
    "qwen3": _qwen3,
    "olmo3": _olmo3,
    "siglip": _siglip,
    "siglip_both": _siglip_both,
    "clip": _clip,
    "clip_both": _clip_both,
    "dinov2": _dinov2,
}


def plain_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((), N_TOKENS)


def save_pretrained(folder: Path, kind: str, **fields: Any) -> PreTrainedModel:
    """Save a model of `kind` with weights of order one; `fields` are of its configuration."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(len(kind))
    model = _MODELS[kind](**fields).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn_like(weight)
            if "embed" in name or "position" in name or "cls_token" in name:
                weight.copy_(drawn * 0.5)
            elif weight.dim() >= 2:
                weight.copy_(drawn * weight[0].numel() ** -0.5)
            else:
                is_scale = name.endswith(("weight", "lambda1"))
                weight.copy_(drawn * 0.1 + (1.0 if is_scale else 0.0))
    model.save_pretrained(folder)
    if kind in ("qwen3", "olmo3"):
        plain_tokenizer().save_pretrained(folder)
    return model
