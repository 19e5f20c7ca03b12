"""A model of two layers everywhere, two heads of queries to one of keys, with large weights."""

from __future__ import annotations

import torch

from molmo_hf.configuration_molmo2 import (
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VitConfig,
)
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.recipes.tiny import VOCAB_SIZE

PATCH_PX = 14


def small_model(
    *, crop_px: int, bidirectional: str = "all", is_tied: bool = False
) -> Molmo2ForConditionalGeneration:
    """The same weights each time, in training mode."""
    vit = Molmo2VitConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        image_default_input_size=(crop_px, crop_px),
        image_patch_size=PATCH_PX,
        image_num_pos=(crop_px // PATCH_PX) ** 2,
    )
    adapter = Molmo2AdapterConfig(
        vit_layers=(-1, -2),
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        text_hidden_size=32,
    )
    text = Molmo2TextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        qkv_bias=False,
        num_hidden_layers=2,
        intermediate_size=48,
        rope_theta=10_000.0,
        use_qk_norm=True,
        qk_norm_type="qwen3",
        tie_word_embeddings=is_tied,
    )
    config = Molmo2Config(
        vit_config=vit,
        adapter_config=adapter,
        text_config=text,
        bidirectional=bidirectional,
        tie_word_embeddings=is_tied,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    model = Molmo2ForConditionalGeneration(config)
    if is_tied:
        model.lm_head.weight = model.model.transformer.wte.embedding
    return model.train()
