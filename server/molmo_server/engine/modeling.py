"""Molmo2 in vLLM as it was trained; registered in place of vLLM's own class.

What differs from the stock class, which is kept for everything else:

* image features are *added* to the embedding of their `<im_patch>` token, not put in its place;
* pixels come as bytes and are normalised portion by portion;
* the vision tower keeps the hidden states that are used, not those of all layers, and works in
  portions, so a long video does not need memory for all frames in all layers;
* a tower may have a class token and a norm in front of its layers (CLIP, DINOv2);
* a checkpoint with tied embeddings need not store the output matrix.

Knows: vLLM 0.32's Molmo2 modules. Does not know: the mask (`visual_attention`), preprocessing
(`processing`). Source: Molmo2's reference forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.molmo2 import (
    Molmo2DummyInputsBuilder,
    Molmo2ForConditionalGeneration,
    Molmo2VisionBackbone,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from molmo_server.engine.processing import FaithfulProcessingInfo, FaithfulProcessor

_CROPS_PER_PORTION = 32
_TIED_SOURCE, _TIED_TARGET = "model.transformer.wte.embedding", "lm_head.weight"


@MULTIMODAL_REGISTRY.register_processor(
    FaithfulProcessor, info=FaithfulProcessingInfo, dummy_inputs=Molmo2DummyInputsBuilder
)
class FaithfulMolmo2(Molmo2ForConditionalGeneration):
    """Molmo2ForConditionalGeneration with additive fusion."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        backbone = self.vision_backbone
        backbone.encode_image = MethodType(encode_crops, backbone)
        _complete_tower(backbone.image_vit, self.config.vit_config)

    def _process_image_input(self, image_input: Any) -> tuple[torch.Tensor, ...]:
        return self._fuse(
            image_input["pixel_values"],
            image_input["token_pooling"],
            image_input["num_pooled_patches"],
            image_input["image_tokens"],
            image_input["num_image_tokens"],
        )

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        return self._fuse(
            video_input["pixel_values_videos"],
            video_input["token_pooling"],
            video_input["num_pooled_patches"],
            video_input["video_tokens"],
            video_input["num_video_tokens"],
        )

    def _fuse(
        self,
        crops: torch.Tensor,
        pooling: torch.Tensor,
        n_features: torch.Tensor,
        token_ids: torch.Tensor,
        n_tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Embed the visual tokens of several items; features are added where patches stand.

        `crops` (crops, patches, pixels of a patch), `pooling` (features, window area), `token_ids`
        (visual tokens of all items); `n_features` and `n_tokens` count them for each item.
        Returns one (tokens, hidden size) tensor for each item.
        """
        features = self.vision_backbone(
            images=crops.unsqueeze(0), token_pooling=pooling.unsqueeze(0)
        )
        is_patch = token_ids == self.img_patch_id
        if not len(features) == int(n_features.sum()) == int(is_patch.sum()):
            raise ValueError(
                f"{len(features)} visual features for {int(is_patch.sum())} patch tokens and "
                f"{int(n_features.sum())} pooled windows; they must be equal: the processor's "
                "settings and the checkpoint's vision tower do not belong together"
            )
        embedded = self.get_language_model().embed_input_ids(token_ids)
        embedded[is_patch] += features.to(embedded.dtype)
        return torch.split(embedded, n_tokens.tolist())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.config.tie_word_embeddings:
            weights = _with_tied_head(weights)
        return super().load_weights(weights)  # type: ignore[no-any-return]


def encode_crops(backbone: Molmo2VisionBackbone, crops: torch.Tensor) -> torch.Tensor:
    """(1, crops, patches, pixels) → (1, crops, patches, width of all used layers together).

    `crops` holds bytes, 0 to 255, in the number format of the model: 16 bits hold them exactly.
    """
    batch, n_crops, n_patches, n_pixels = crops.shape
    flat = crops.reshape(batch * n_crops, n_patches, n_pixels)
    portions = torch.split(flat, _CROPS_PER_PORTION)
    encoded = [
        _encode_portion(backbone.image_vit, _normalised(portion), backbone.vit_layers)
        for portion in portions
    ]
    return torch.cat(encoded).view(batch, n_crops, n_patches, -1)


def _normalised(values: torch.Tensor) -> torch.Tensor:
    """Bytes → −1…1 by the steps of `molmo_core.pixels.normalised`, in float32 and then rounded."""
    floats = values.float()
    # By a tensor: a GPU multiplies by the rounded inverse of a plain number.
    return floats.div(floats.new_full((), 255)).sub_(0.5).mul_(2).to(values.dtype)


def _encode_portion(tower: Any, crops: torch.Tensor, used_layers: Sequence[int]) -> torch.Tensor:
    hidden = tower.add_pos_emb(tower.patch_embedding(crops), tower.patch_num)
    n_patches = hidden.shape[1]
    if tower.class_embedding is not None:
        hidden = torch.cat([tower.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
    if tower.pre_ln is not None:
        hidden = tower.pre_ln(hidden)
    kept: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(tower.transformer.resblocks):
        hidden = block(hidden)
        if layer in used_layers:
            kept[layer] = hidden[:, -n_patches:]
    return torch.cat([kept[layer] for layer in used_layers], dim=-1)


def _complete_tower(tower: Any, config: Any) -> None:
    """Add what only some towers have; vLLM's class knows SigLIP's."""
    tower.class_embedding = tower.pre_ln = None
    if getattr(config, "class_token", False):
        tower.class_embedding = torch.nn.Parameter(torch.zeros(config.hidden_size))
    if getattr(config, "pre_norm", False):
        tower.pre_ln = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _with_tied_head(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterable[tuple[str, torch.Tensor]]:
    """Add the output matrix where the checkpoint holds it only as the input embedding."""
    tied, has_head = None, False
    for name, weight in weights:
        has_head |= name == _TIED_TARGET
        if name == _TIED_SOURCE:
            tied = weight
        yield name, weight
    if tied is not None and not has_head:
        yield _TIED_TARGET, tied
