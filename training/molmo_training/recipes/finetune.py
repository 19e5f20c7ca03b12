"""A user's own data on a checkpoint of any size: all of it, parts of it, or adapters.

Knows: settings that suit a few hundred to a few thousand examples and one small GPU or a CPU. Does
not know: the data, which `--data` names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from molmo_training.compute import ComputeConfig
from molmo_training.data.mixture import Group, Part
from molmo_training.data.own.table import open_tables
from molmo_training.data.packing import Budgets
from molmo_training.lora import LoraConfig
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.sft import ROOTS
from molmo_training.train_config import (
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    SavingConfig,
    TrainConfig,
)


def finetune() -> TrainConfig:
    """All parameters but the embedding, at the rates of the fine-tuning stage."""
    return TrainConfig(
        recipe="finetune",
        n_steps=200,
        model=ModelConfig(bidirectional=None, residual_dropout=0.1),
        data=DataConfig(
            mixture=Group(name="own", parts=()),
            budgets=Budgets(n_tokens=4096, n_crops=32),
            packs_per_step=8,
            weighting=ROOTS,
        ),
        optim=OptimConfig(
            llm=GroupConfig(lr=1e-5, warmup_steps=20),
            connector=GroupConfig(lr=5e-6, warmup_steps=20),
            vit=GroupConfig(lr=5e-6, warmup_steps=20),
        ),
        compute=ComputeConfig(compile_blocks=False),
        saving=SavingConfig(publish_name="finetuned"),
        log_every=5,
        save_every=100,
        validate_every=50,
    )


def finetune_lora() -> TrainConfig:
    """Adapters on the decoder and the connector, at a rate that suits them."""
    whole = finetune()
    rate = GroupConfig(lr=2e-4, warmup_steps=20)
    return replace(
        whole,
        recipe="finetune-lora",
        model=replace(whole.model, residual_dropout=0.0, lora=LoraConfig(dropout=0.05)),
        optim=OptimConfig(llm=rate, connector=rate, vit=rate),
    )


def with_own_data(
    config: TrainConfig, learnt: tuple[Path, ...], held_out: tuple[Path, ...] = ()
) -> TrainConfig:
    """The settings with a user's files in the place of the mixture. Raises DataError."""
    paths = learnt + held_out
    names = [table.name for table in open_tables(list(paths))]
    parts = tuple(Part(dataset=name) for name in names[: len(learnt)])
    looked_at = tuple(HeldOutConfig(name=name, dataset=name) for name in names[len(learnt) :])
    data = replace(
        config.data,
        files=paths,
        mixture=Group(name="own", parts=parts) if learnt else config.data.mixture,
        settings_of=() if learnt else config.data.settings_of,
        held_out=looked_at if learnt else config.data.held_out + looked_at,
    )
    return replace(config, data=data)
