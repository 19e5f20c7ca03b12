"""Random-weight Molmo2 folders of every architecture variant, in the released layout; and the one
that is packaged.

Random weights are scaled so that activations stay of order one and every part of the model moves
the logits: with the usual small initialisation a wrong mask would hardly show.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from molmo_core.tokens import ADDITIONAL_VOCAB_SIZE
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.export import save_checkpoint
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.tokenizer import build_tokenizer, train_tokenizer

TINY = Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
BASE_VOCAB = 320
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 1024,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32,
    "beta_slow": 1,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": {"use_qk_norm": True, "qk_norm_type": "qwen3", "num_key_value_heads": 2},
    "qwen3_tied": {
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "olmo3": {
        "use_qk_norm": True,
        "qk_norm_type": "olmo",
        "num_key_value_heads": 4,
        "norm_after": True,
        "rope_scaling": _YARN,
        "rope_scaling_layers": [1, 3],
    },
    "plain": {
        "use_qk_norm": False,
        "qkv_bias": True,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 128,
    },
    "causal": {"use_qk_norm": True, "qk_norm_type": "qwen3", "num_key_value_heads": 2},
    "clip_tower": {"use_qk_norm": True, "qk_norm_type": "qwen3", "num_key_value_heads": 2},
}
"""Fields of the decoder; all else is common but the tower of the last."""
_CLIP_TOWER = {
    "class_token": True,
    "pre_norm": True,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def write_checkpoint(folder: Path, variant: str, *, seed: int = 0) -> Path:
    """Write a small float32 checkpoint with the project's own export; returns its folder."""
    config = Molmo2Config(
        text_config={**_TEXT, **VARIANTS[variant]},
        vit_config=_VIT | (_CLIP_TOWER if variant == "clip_tower" else {}),
        adapter_config=_ADAPTER,
        bidirectional="none" if variant == "causal" else "all",
    )
    model = Molmo2ForConditionalGeneration(config)
    _draw_weights(model, seed)
    tokenizer = build_tokenizer(train_tokenizer((), BASE_VOCAB - 20), BASE_VOCAB)
    save_checkpoint(model, folder, config=config, tokenizer=tokenizer)
    if "tied" in variant:
        _tie_head(folder)
    return folder


def _tie_head(folder: Path) -> None:
    """As some publish it: the config says that the head is the embedding, the file lacks it."""
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_TEXT = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": BASE_VOCAB,
    "additional_vocab_size": ADDITIONAL_VOCAB_SIZE,
    "qkv_bias": False,
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 8192,
}
_VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
_ADAPTER = {
    "vit_layers": (-1, -3),
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 160,
    "text_hidden_size": 128,
}


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Matrices keep the size of what they multiply; scales and biases are near 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if "embedding" in name:
                weight.copy_(drawn * 0.5)
            elif weight.dim() == 2:
                weight.copy_(drawn * weight.shape[1] ** -0.5)
            else:
                weight.copy_(drawn * 0.1 + (1.0 if name.endswith("weight") else 0.0))
