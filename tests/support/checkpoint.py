"""Random-weight Molmo2 folders of every architecture variant, in the released layout.

Weights are scaled so that activations stay of order one and every part of the model moves the
logits: with the usual small initialisation a wrong mask would hardly show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders

from molmo_core.tokens import (
    ADDITIONAL_VOCAB_SIZE,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    filler_token,
)

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
        "tie_word_embeddings": True,
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
}
"""Fields of the decoder; all else is common."""


def write_checkpoint(folder: Path, variant: str, *, seed: int = 0) -> Path:
    """Write a small float32 checkpoint and return its folder."""
    from molmo_hf.configuration_molmo2 import Molmo2Config
    from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    text = {**_TEXT, **VARIANTS[variant]}
    is_tied = text.get("tie_word_embeddings", False)
    config = Molmo2Config(
        text_config=text,
        vit_config=_VIT,
        adapter_config=_ADAPTER,
        bidirectional="none" if variant == "causal" else "all",
        tie_word_embeddings=is_tied,
        architectures=["Molmo2ForConditionalGeneration"],
    )
    model = Molmo2ForConditionalGeneration(config)
    _draw_weights(model, seed)
    weights = dict(model.state_dict())
    if is_tied:
        del weights["lm_head.weight"]  # a tied folder need not hold the matrix twice
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    _write_tokenizer(folder)
    _write_processors(folder)
    return folder


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


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, then the control tokens, padding up to the base vocabulary, specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    controls = [END_OF_TEXT, TURN_START, TURN_END]
    fillers = [filler_token(k) for k in range(BASE_VOCAB - len(alphabet) - len(controls))]
    added = [*controls, *fillers, *SPECIAL_TOKENS]
    vocab = {token: k for k, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_END,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_processors(folder: Path) -> None:
    """The files of a released folder, its settings as they are there."""
    common = {
        "processor_class": "Molmo2Processor",
        "size": {"height": 378, "width": 378},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "patch_size": 14,
    }
    image = {
        **common,
        "image_processor_type": "Molmo2ImageProcessor",
        "max_crops": 8,
        "overlap_margins": [4, 4],
        "pooling_size": [2, 2],
    }
    video = {
        **common,
        "video_processor_type": "Molmo2VideoProcessor",
        "pooling_size": [3, 3],
        "frame_sample_mode": "uniform_last_frame",
        "num_frames": 384,
        "max_fps": 2,
        "sampling_fps": 2,
        "do_sample_frames": True,
    }
    joint = {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": True,
    }
    for name, content in (
        ("preprocessor_config.json", image),
        ("video_preprocessor_config.json", video),
        ("processor_config.json", joint),
    ):
        (folder / name).write_text(json.dumps(content))
