"""molmo2-tiny: a Molmo2 of a few million parameters, trained from nothing on drawn scenes.

`python -m molmo_training.recipes.tiny FOLDER` trains and goes on where FOLDER stands,
`python -m molmo_training.package FOLDER OUT` writes the checkpoint that ships with the package.
Knows: sizes, data mixture, schedule of this one model. Does not know: the loop, the layout.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from molmo_hf.export import save_settings
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.checkpoints.opened import RUN_SETTINGS
from molmo_training.checkpoints.publish import Publishing
from molmo_training.compute import ComputeConfig
from molmo_training.data.example import Example
from molmo_training.data.loader import BatchStream, Source, make_loader
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import Forward
from molmo_training.loss import LossConfig
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.object_lessons import ObjectLessons
from molmo_training.recipes.state_file import StateFile
from molmo_training.recipes.tower import PictureStream, TowerConfig, train_tower
from molmo_training.runs.log import append_figures
from molmo_training.trainer import Trainer, TrainerConfig
from molmo_training.vocabulary import load_vocabulary

CROP_PX, PATCH_PX = 126, 14
VOCAB_SIZE = 512
IMAGES = ImageGeometry(crop_px=CROP_PX, patch_px=PATCH_PX, max_crops=1, overlap_margins=(1, 1))
VIDEOS = VideoGeometry(crop_px=CROP_PX, patch_px=PATCH_PX, max_frames=24)
SEED = 691_203
TOWER_MOST_OBJECTS = 16
"""In a picture for the tower alone: the more there are, the more there is to learn of it."""
ONE_OBJECT_GROUPS, FEW_OBJECTS_GROUPS, MOSTLY_ONE_GROUPS = 35, 100, 600
"""Ends of the stretches, in groups of batches: two easy ones, then mostly single pictures; at the
last end F1 was 0.93 on one picture and 0.59 on several."""


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """Everything that decides the weights."""

    folder: Path
    max_steps: int = 4000
    max_seconds: float | None = None
    learning_rate: float = 2e-3
    connector_rate: float = 1e-3
    vit_rate: float = 6e-4
    tower_steps: int = 2500
    """Steps in which the tower is taught alone; 0 leaves that out."""
    tower_rate: float = 3e-3
    """After 900 steps alone 88 % of the shapes were read rightly; at 8e-3 84 %, with AdamW and the
    same rate 64 %, with AdamW at 6e-4 44 %."""
    n_threads: int = 2
    n_workers: int = 1
    publish_to: str | None = None
    """A store that gets every state that is saved."""
    seed: int = SEED


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


def sources() -> list[Source]:
    """First one object a picture (where is it?), then a few (which one?), then everything, in the
    end mostly several pictures."""
    one, few, most = ONE_OBJECT_GROUPS, FEW_OBJECTS_GROUPS, MOSTLY_ONE_GROUPS
    return [
        Source(name="one", make=_objects(1), rate=0.9, batch_size=32, end_group=one),
        Source(
            name="few", make=_objects(3), rate=0.7, batch_size=32, first_group=one, end_group=few
        ),
        Source(name="early", make=image_example, rate=0.1, batch_size=32, end_group=few),
        Source(name="image", make=image_example, rate=0.5, batch_size=32, first_group=few),
        Source(
            name="images",
            make=multi_image_example,
            rate=0.2,
            batch_size=16,
            first_group=one,
            end_group=most,
        ),
        Source(name="video", make=_video, rate=0.3, batch_size=8, first_group=few),
        Source(name="several", make=multi_image_example, rate=0.9, batch_size=16, first_group=most),
    ]


def _objects(most: int) -> Callable[[np.random.Generator], Example]:
    return partial(image_example, most_objects=most)


def _video(rng: np.random.Generator) -> Example:
    return video_example(rng, VIDEOS)


def build_trainer(recipe: TinyRecipe) -> tuple[Trainer, Tokenizing]:
    torch.set_num_threads(recipe.n_threads)
    model = build_model(recipe.seed)
    publishing = (
        None
        if recipe.publish_to is None
        else Publishing(store=recipe.publish_to, name="molmo2-tiny", compute_dtype=torch.float32)
    )
    config = TrainerConfig(
        n_steps=recipe.max_steps,
        max_seconds=recipe.max_seconds,
        optim=OptimConfig(
            llm=GroupConfig(lr=recipe.learning_rate),
            connector=GroupConfig(lr=recipe.connector_rate),
            vit=GroupConfig(lr=recipe.vit_rate),
            muon=True,
        ),
        loss=LossConfig(z_weight=0.0),
        compute=ComputeConfig(device="cpu", activation_checkpointing=False),
        save_every=100,
    )
    trainer = Trainer(
        model,
        config,
        forward=Forward(model, attention="dense"),
        states=StateFile(recipe.folder, publishing.publish if publishing else None),
        show=partial(append_figures, recipe.folder),
        lessons=make_lessons(model),
    )
    tokenizing = Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)
    return trainer, tokenizing


def make_lessons(model: Molmo2ForConditionalGeneration) -> ObjectLessons:
    return ObjectLessons(model, n_shapes=len(SHAPES), n_colours=len(COLOURS))


def train(recipe: TinyRecipe) -> Trainer:
    """Run the recipe, going on where its folder stands."""
    trainer, tokenizing = build_trainer(recipe)
    write_settings(recipe.folder)
    if not trainer.resume() and recipe.tower_steps:
        _teach_tower(trainer, recipe)
        trainer.save()
    stream = BatchStream(sources(), tokenizing, recipe.seed, first_batch=trainer.at.step)
    trainer.run(make_loader(stream, n_workers=recipe.n_workers))
    return trainer


def write_settings(folder: Path) -> None:
    """Put beside the run's state what else a checkpoint is made of, unless it is there."""
    settings = folder / RUN_SETTINGS
    if not settings.exists():
        partial = folder / f"{RUN_SETTINGS}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_settings(
            partial,
            config=tiny_config(),
            tokenizer=load_vocabulary().for_transformers(),
            images=IMAGES,
            videos=VIDEOS,
        )
        partial.rename(settings)


def _teach_tower(trainer: Trainer, recipe: TinyRecipe) -> None:
    make = partial(image_example, most_objects=TOWER_MOST_OBJECTS, n_branches=1)
    pictures = PictureStream(make, IMAGES, batch_size=32, seed=recipe.seed + 1)
    assert isinstance(trainer.lessons, ObjectLessons)
    train_tower(
        trainer.model.model.vision_backbone,
        trainer.lessons.probes.patches,
        make_loader(pictures, n_workers=recipe.n_workers),
        TowerConfig(
            folder=recipe.folder,
            n_steps=recipe.tower_steps,
            optim=OptimConfig(
                vit=GroupConfig(lr=recipe.tower_rate, warmup_steps=100),
                muon=True,
                final_fraction=0.02,
            ),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=None)
    parser.add_argument("--max-steps", type=int, default=TinyRecipe.max_steps)
    parser.add_argument("--tower-steps", type=int, default=TinyRecipe.tower_steps)
    parser.add_argument("--threads", type=int, default=TinyRecipe.n_threads)
    parser.add_argument("--learning-rate", type=float, default=TinyRecipe.learning_rate)
    parser.add_argument("--publish-to", default=None, help="store that gets every saved state")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        TinyRecipe(
            folder=arguments.folder,
            max_steps=arguments.max_steps,
            tower_steps=arguments.tower_steps,
            max_seconds=arguments.hours * 3600 if arguments.hours else None,
            n_threads=arguments.threads,
            learning_rate=arguments.learning_rate,
            publish_to=arguments.publish_to,
        )
    )


if __name__ == "__main__":
    main()
