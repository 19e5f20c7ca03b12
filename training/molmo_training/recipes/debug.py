"""What the debug variants of the stages share: drawn scenes, small packs, high rates.

Knows: sizes for a CPU and a few minutes. Does not know: the stages.
"""

from __future__ import annotations

from typing import Any

from molmo_training.compute import ComputeConfig
from molmo_training.data.packing import Budgets
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.mixtures import mixture
from molmo_training.train_config import DataConfig, HeldOutConfig, ModelConfig, TrainConfig


def debug_stage(recipe: str, model: ModelConfig, **data: Any) -> TrainConfig:
    """The mixture of the recipe's name in packs that a CPU computes in about a second.

    `data` are further settings of it.
    """
    groups, special = mixture(recipe)
    held_out = HeldOutConfig(name="val", dataset="drawn_points", n_examples=24)
    return TrainConfig(
        recipe=recipe,
        n_steps=200,
        model=model,
        data=DataConfig(
            mixture=groups,
            settings_of=special,
            budgets=Budgets(n_tokens=1024, n_crops=24),
            packs_per_step=4,
            packs_per_batch=2,
            buffer_size=16,
            n_workers=1,
            held_out=(held_out,),
            **data,
        ),
        optim=OptimConfig(
            llm=GroupConfig(lr=2e-3, warmup_steps=20),
            connector=GroupConfig(lr=1e-3, warmup_steps=20),
            vit=GroupConfig(lr=6e-4, warmup_steps=20),
            muon=True,
        ),
        compute=ComputeConfig(device="cpu", activation_checkpointing=False),
        log_every=5,
        save_every=50,
        validate_every=50,
    )
