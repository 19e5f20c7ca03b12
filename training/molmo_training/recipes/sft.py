"""Stage 2: everything the model is asked for, from a pre-trained checkpoint.

Knows: the settings with which the released models were trained, and a debug variant of drawn
scenes. Does not know: the loop. Source: supervised fine-tuning of Molmo2. The number of steps is
the one of the released models; the reference's script has ten times as many, over which the
learning rate would hardly fall.
"""

from __future__ import annotations

from molmo_training.data.formatting import SFT
from molmo_training.data.packing import Budgets
from molmo_training.data.sampling import SFT_MEDIA
from molmo_training.data.tree import Weighting
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.parallel.mesh import ParallelConfig
from molmo_training.recipes.debug import debug_stage
from molmo_training.recipes.mixtures import mixture
from molmo_training.train_config import DataConfig, ModelConfig, SavingConfig, TrainConfig

ROOTS = Weighting(root_subsegments=True, root_length=True)


def sft() -> TrainConfig:
    """30 000 steps of 128 packs of 16 384 tokens."""
    groups, settings = mixture("sft")
    return TrainConfig(
        recipe="sft",
        n_steps=30_000,
        model=ModelConfig(residual_dropout=0.1, max_tokens=16_384),
        data=DataConfig(
            mixture=groups,
            settings_of=settings,
            budgets=Budgets(n_tokens=16_384, n_crops=128),
            packs_per_batch=2,
            format=SFT,
            media=SFT_MEDIA,
            max_crops=8,
            weighting=ROOTS,
            seed=50_189,
            n_workers=6,
            n_prefetched=4,
        ),
        optim=OptimConfig(
            llm=GroupConfig(lr=1e-5), connector=GroupConfig(lr=5e-6), vit=GroupConfig(lr=5e-6)
        ),
        parallel=ParallelConfig(shard="fsdp"),
        saving=SavingConfig(publish_name="molmo2-sft"),
        save_every=2000,
    )


def sft_debug() -> TrainConfig:
    """The checkpoint of a debug stage, or another small one, on drawn scenes and clips."""
    model = ModelConfig(residual_dropout=0.1)
    return debug_stage("sft-debug", model, format=SFT, weighting=ROOTS)
