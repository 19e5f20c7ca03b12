"""molmo2-tiny: a Molmo2 of a few million parameters, trained from nothing on drawn scenes.

`recipes.tower` teaches its vision tower alone, then the stages of this file follow one another,
each from the run before (`deploy/train-tiny`).
Knows: sizes, data mixtures, schedules of this one model. Does not know: the loop, the layout.
"""

from __future__ import annotations

import numpy as np
import torch

from molmo_core.images import ImageGeometry
from molmo_core.scenes import COLOURS, SHAPES
from molmo_core.videos import VideoGeometry
from molmo_hf.configuration_molmo2 import (
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VitConfig,
)
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.compute import ComputeConfig
from molmo_training.data.mixture import Group, Part
from molmo_training.data.packing import Budgets
from molmo_training.freezing import TrainedParts
from molmo_training.loss import LossConfig
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.object_lessons import ObjectLessons
from molmo_training.train_config import DataConfig, ModelConfig, SavingConfig, TrainConfig

CROP_PX, PATCH_PX = 126, 14
VOCAB_SIZE = 512
IMAGES = ImageGeometry(crop_px=CROP_PX, patch_px=PATCH_PX, max_crops=1, overlap_margins=(1, 1))
VIDEOS = VideoGeometry(crop_px=CROP_PX, patch_px=PATCH_PX, max_frames=24)
SEED = 691_203


def tiny_config() -> Molmo2Config:
    """4 tower layers and 6 decoder layers of width 192: about 5 M parameters."""
    vit = Molmo2VitConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        image_default_input_size=(CROP_PX, CROP_PX),
        image_patch_size=PATCH_PX,
        image_num_pos=(CROP_PX // PATCH_PX) ** 2,
    )
    adapter = Molmo2AdapterConfig(
        vit_layers=(-1, -3),
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        intermediate_size=512,
        text_hidden_size=192,
    )
    text = Molmo2TextConfig(
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB_SIZE,
        qkv_bias=False,
        num_hidden_layers=6,
        intermediate_size=512,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        use_qk_norm=True,
        qk_norm_type="qwen3",
    )
    return Molmo2Config(vit_config=vit, adapter_config=adapter, text_config=text)


def build_model(seed: int) -> Molmo2ForConditionalGeneration:
    """Random weights from which places are seen at once.

    Positions of patches start as 2-D sines. The layers of tower and connector
    start near the variance of their input: with the usual 0.02 the features of an image would
    have a two-hundredth of the size of the embeddings that they are added to (1e-4 against 2e-2),
    and nothing would be learnt of them for thousands of steps.
    """
    torch.manual_seed(seed)
    model = Molmo2ForConditionalGeneration(tiny_config())
    backbone = model.model.vision_backbone
    with torch.no_grad():
        positions = backbone.image_vit.positional_embedding
        positions.copy_(sine_positions(CROP_PX // PATCH_PX, 192))
        layers = backbone.image_vit.transformer
        for part in (layers, backbone.image_pooling_2d, backbone.image_projector):
            for layer in part.modules():
                if isinstance(layer, torch.nn.Linear):
                    torch.nn.init.normal_(layer.weight, std=0.7 * layer.in_features**-0.5)
    return model


def sine_positions(side: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions (side², width): the first half of the width tells the row."""
    frequencies = torch.exp(torch.arange(width // 4) * (-np.log(10_000.0) / (width // 4)))
    angles = torch.arange(side)[:, None] * frequencies[None] * (np.pi / 2)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    rows = line[:, None].expand(side, side, -1)
    cols = line[None].expand(side, side, -1)
    return torch.cat([rows, cols], dim=-1).reshape(side * side, width).float()


def make_lessons(model: Molmo2ForConditionalGeneration) -> ObjectLessons:
    return ObjectLessons(model, n_shapes=len(SHAPES), n_colours=len(COLOURS))


def tiny_one() -> TrainConfig:
    """Where is it? Mostly one object a picture."""
    return _stage("tiny-one", 140, {"verbs_one": 0.9, "verbs_image": 0.1}, final=1.0)


def tiny_few() -> TrainConfig:
    """Which one? Up to three objects a picture, and several pictures."""
    shares = {"verbs_few": 0.74, "verbs_image": 0.1, "verbs_images": 0.16}
    return _stage("tiny-few", 260, shares, final=1.0)


def tiny() -> TrainConfig:
    """Everything."""
    shares = {"verbs_image": 0.74, "verbs_images": 0.15, "verbs_video": 0.11}
    return _stage("tiny", 2000, shares, final=0.45)


def tiny_several() -> TrainConfig:
    """Everything, mostly of several pictures: without this stage F1 was 0.93 on one picture and
    0.59 on several."""
    shares = {"verbs_image": 0.53, "verbs_images": 0.38, "verbs_video": 0.09}
    return _stage("tiny-several", 1600, shares, rate=0.45, final=0.02)


def corners() -> TrainConfig:
    """molmo2-tiny finetuned: how many corners has the red star?

    Shapes it knows; that they have corners it was never asked. The demonstration of the way from
    training to live traffic (`make hotload-demo`) teaches it in minutes, among questions of the
    kind that it knows, so that it forgets nothing.
    """
    return TrainConfig(
        recipe="corners",
        n_steps=200,
        model=ModelConfig(bidirectional=None, trained=TrainedParts(ft_embedding="all")),
        data=_data({"verbs_corners": 0.6, "verbs_image": 0.4}, packs_per_step=4),
        optim=OptimConfig(
            llm=GroupConfig(lr=5e-4, warmup_steps=20),
            connector=GroupConfig(lr=1e-4, warmup_steps=20),
            vit=GroupConfig(lr=2e-5, warmup_steps=20),
            muon=True,
        ),
        loss=LossConfig(z_weight=0.0),
        compute=ComputeConfig(device="cpu", activation_checkpointing=False),
        saving=SavingConfig(publish_name="corners"),
        log_every=10,
        save_every=50,
    )


def _stage(
    name: str, n_steps: int, shares: dict[str, float], *, rate: float = 1.0, final: float
) -> TrainConfig:
    """`rate` and `final` are those of the stage's begin and end, as parts of the highest."""
    return TrainConfig(
        recipe=name,
        n_steps=n_steps,
        model=ModelConfig(
            bidirectional=None,
            object_lessons=True,
            trained=TrainedParts(ft_embedding="all"),  # nothing of it was pretrained
        ),
        data=_data(shares, packs_per_step=8),
        optim=OptimConfig(
            llm=GroupConfig(lr=2e-3 * rate, warmup_steps=20),
            connector=GroupConfig(lr=1e-3 * rate, warmup_steps=20),
            vit=GroupConfig(lr=6e-4 * rate, warmup_steps=20),
            muon=True,
            final_fraction=final / rate,
        ),
        loss=LossConfig(z_weight=0.0),
        compute=ComputeConfig(device="cpu", activation_checkpointing=False),
        saving=SavingConfig(publish_name="molmo2-tiny"),
        save_every=100,
    )


def _data(shares: dict[str, float], *, packs_per_step: int) -> DataConfig:
    parts = tuple(Part(dataset=name, rate=share) for name, share in shares.items())
    return DataConfig(
        mixture=Group(name="verbs", parts=parts),
        budgets=Budgets(n_tokens=1024, n_crops=32),
        packs_per_step=packs_per_step,
        packs_per_batch=packs_per_step,
        n_workers=1,
        seed=SEED,
    )
