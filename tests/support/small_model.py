"""A model of two layers everywhere, two heads of queries to one of keys, with large weights."""

from __future__ import annotations

import torch

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.recipes.tiny import PATCH_PX, tiny_config

_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
_VISION = {**_WIDTHS, "num_attention_heads": 2, "head_dim": 16}


def small_model(
    *, crop_px: int, bidirectional: str = "all", is_tied: bool = False
) -> Molmo2ForConditionalGeneration:
    """The same weights each time, in training mode; what is not said here is as in molmo2-tiny."""
    tiny = tiny_config()
    grid = {"image_default_input_size": (crop_px,) * 2, "image_num_pos": (crop_px // PATCH_PX) ** 2}
    tiny.vit_config.update({**_VISION, "num_hidden_layers": 2, **grid})
    tiny.adapter_config.update({**_VISION, "vit_layers": (-1, -2), "text_hidden_size": 32})
    heads = {"num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2}
    tiny.text_config.update({**_WIDTHS, **heads, "tie_word_embeddings": is_tied})
    config = Molmo2Config(
        vit_config=tiny.vit_config,
        adapter_config=tiny.adapter_config,
        text_config=tiny.text_config,
        bidirectional=bidirectional,
        tie_word_embeddings=is_tied,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    model = Molmo2ForConditionalGeneration(config)
    if is_tied:
        model.lm_head.weight = model.model.transformer.wte.embedding
    return model.train()
