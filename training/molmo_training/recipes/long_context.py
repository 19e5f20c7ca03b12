"""Stage 3: longer videos in longer packs, from a fine-tuned checkpoint.

Knows: what differs from stage 2. Does not know: the loop. Source: long-context training of Molmo2.
"""

from __future__ import annotations

from dataclasses import replace

from molmo_training.compute import ComputeConfig
from molmo_training.data.packing import Budgets
from molmo_training.data.sampling import LONG_CONTEXT_MEDIA
from molmo_training.parallel.mesh import ParallelConfig
from molmo_training.recipes.sft import sft, sft_debug
from molmo_training.train_config import SavingConfig, TrainConfig


def long_context() -> TrainConfig:
    """2 000 steps of 128 packs of 36 864 tokens; eight ranks share a batch."""
    before = sft()
    return replace(
        before,
        recipe="long-context",
        n_steps=2000,
        model=replace(before.model, max_tokens=36_864),
        data=replace(
            before.data,
            budgets=Budgets(n_tokens=36_864, n_crops=384),
            packs_per_batch=1,
            media=LONG_CONTEXT_MEDIA,
            n_workers=4,
        ),
        parallel=ParallelConfig(context_degree=8, shard="fsdp"),
        compute=ComputeConfig(compile_blocks=False),
        saving=SavingConfig(publish_name="molmo2"),
        save_every=500,
    )


def long_context_debug() -> TrainConfig:
    """Twice the debug stage's packs, in which clips of all frames have room."""
    before = sft_debug()
    return replace(
        before,
        recipe="long-context-debug",
        n_steps=50,
        data=replace(
            before.data,
            budgets=Budgets(n_tokens=2048, n_crops=48),
            packs_per_batch=1,
        ),
    )
