"""Stage 1: captions, points and text, from a pretrained decoder and tower.

Knows: the settings with which the released models were trained, and a debug variant of drawn
scenes. Does not know: the loop. Source: pre-training of Molmo2. Two settings are those of the
released models and not of the reference's script, which leaves them out: the mask of visual tokens
and the weights of branches.
"""

from __future__ import annotations

from molmo_training.data.formatting import PRETRAIN
from molmo_training.data.packing import Budgets
from molmo_training.data.sampling import PRETRAIN_MEDIA
from molmo_training.data.tree import Weighting
from molmo_training.freezing import TrainedParts
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.parallel.mesh import ParallelConfig
from molmo_training.recipes.debug import debug_stage
from molmo_training.recipes.mixtures import mixture
from molmo_training.train_config import (
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    SavingConfig,
    TrainConfig,
)


def pretrain() -> TrainConfig:
    """31 000 steps of 128 packs of 2 536 tokens."""
    groups, settings = mixture("pretrain")
    return TrainConfig(
        recipe="pretrain",
        n_steps=31_000,
        model=ModelConfig(response_dropout=0.1),
        data=DataConfig(
            mixture=groups,
            settings_of=settings,
            budgets=Budgets(n_tokens=2536, n_crops=16),
            packs_per_batch=4,
            format=PRETRAIN,
            media=PRETRAIN_MEDIA,
            max_crops=8,
            weighting=Weighting(root_subsegments=True),
            seed=95_818,
            held_out=(
                HeldOutConfig(name="val", dataset="pixmo_cap_with_transcripts"),
                HeldOutConfig(name="caption_val", dataset="pixmo_cap"),
            ),
        ),
        optim=OptimConfig(
            llm=GroupConfig(lr=2e-5, warmup_steps=2000),
            connector=GroupConfig(lr=2e-4, warmup_steps=200),
            vit=GroupConfig(lr=6e-6, warmup_steps=2000),
        ),
        parallel=ParallelConfig(shard="fsdp"),
        saving=SavingConfig(publish_name="molmo2-pretrain"),
        save_every=4000,
    )


def pretrain_debug() -> TrainConfig:
    """A small model from nothing on drawn scenes, on a CPU."""
    model = ModelConfig(
        response_dropout=0.1,
        object_lessons=True,
        # The stages leave embeddings as they were pretrained; here nothing was.
        trained=TrainedParts(ft_embedding="all"),
    )
    weighting = Weighting(root_subsegments=True)
    return debug_stage("pretrain-debug", model, format=PRETRAIN, weighting=weighting, seed=95_818)
