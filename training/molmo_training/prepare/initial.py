"""A Molmo2 to begin training from: a pretrained decoder and tower, the rest drawn.

Knows: how the parts meet, what is drawn and how. Does not know: where parts come from (`parts`),
the layout (`molmo_hf.export`). Source: spec of Molmo2's initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.configuration_molmo2 import Molmo2AdapterConfig, Molmo2Config
from molmo_hf.export import WithHead
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.weight_files import Place
from molmo_training.checkpoints.convert import to_hugging_face
from molmo_training.checkpoints.opened import Kind, OpenedCheckpoint
from molmo_training.checkpoints.weight_views import OnlyRead, Overlaid
from molmo_training.named_draws import draw_normal
from molmo_training.prepare.parts import LlmPart, VitPart

VIT_LAYERS = (-3, -9)
"""Layers of the tower that the connector reads, counted from its end."""
INIT_STD = 0.02
"""Of the connector and the embeddings of the new tokens."""


def build_initial(
    llm: LlmPart,
    vit: VitPart,
    out: Path,
    *,
    vit_layers: tuple[int, ...] = VIT_LAYERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder in the Hugging Face layout, with the tower's crops; return it.

    Tensors are computed one at a time. What is drawn depends on `seed` and the name of the tensor
    alone. Raises CheckpointError when the parts do not fit each other, or `out` exists.
    """
    config = _config(llm, vit, vit_layers)
    crop_px, patch_px = vit.config.image_default_input_size[0], vit.config.image_patch_size
    given = WithHead(Overlaid(llm.weights, OnlyRead(vit.weights, config)))
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    drawn = {name: shape for name, shape in expected.items() if name not in given.shapes()}
    initial = OpenedCheckpoint(
        folder=Path(f"{llm.name}+{vit.name}"),
        kind=Kind.HF,
        config=config,
        images=ImageGeometry(crop_px=crop_px, patch_px=patch_px),
        videos=VideoGeometry(crop_px=crop_px, patch_px=patch_px),
        weights=Overlaid(_Drawn(drawn, seed), given),
        is_tied=llm.config.tie_word_embeddings,
        own_tokenizer=llm.tokenizer,
    )
    return to_hugging_face(initial, out, dtype=dtype)


def _config(llm: LlmPart, vit: VitPart, vit_layers: tuple[int, ...]) -> Molmo2Config:
    """Raises CheckpointError for layers that the tower does not have."""
    text, tower, n_layers = llm.config, vit.config, vit.config.num_hidden_layers
    if not vit_layers or not all(-n_layers <= k < n_layers for k in vit_layers):
        raise CheckpointError(
            f"the connector is to read the layers {vit_layers} of a tower of {n_layers}; allowed "
            f"are {-n_layers} to {n_layers - 1}, one at least"
        )
    adapter = Molmo2AdapterConfig(
        vit_layers=vit_layers,
        hidden_size=tower.hidden_size,
        num_attention_heads=tower.num_attention_heads,
        num_key_value_heads=tower.num_key_value_heads,
        head_dim=tower.head_dim,
        intermediate_size=text.intermediate_size,
        text_hidden_size=text.hidden_size,
    )
    return Molmo2Config(
        vit_config=tower, adapter_config=adapter, text_config=text, bidirectional="all"
    )


@dataclass(frozen=True)
class _Drawn:
    """Normal numbers of `INIT_STD`; biases are zero."""

    wanted: Mapping[str, tuple[int, ...]]
    seed: int

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.wanted

    def read(self, name: str) -> Tensor:
        shape = self.wanted[name]
        if name.endswith(".bias"):
            return torch.zeros(shape)
        return draw_normal(shape, std=INIT_STD, seed=self.seed, name=name)

    def place(self, name: str) -> Place | None:
        return None
