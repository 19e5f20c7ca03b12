"""Runs of molmo2-tiny from nothing, without the command that makes them elsewhere.

Knows: the parts of a trainer. Does not know: batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from molmo_hf.export import save_settings
from molmo_training.checkpoints.opened import RUN_SETTINGS
from molmo_training.compute import ComputeConfig
from molmo_training.data.example import Batch
from molmo_training.data.loader import collate
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import Forward
from molmo_training.recipes import tiny
from molmo_training.runs.log import append_figures
from molmo_training.runs.run_state import RunState
from molmo_training.trainer import Trainer, TrainerConfig
from molmo_training.vocabulary import load_vocabulary


def tiny_trainer(folder: Path, *, n_steps: int = 100) -> Trainer:
    """With lessons, at the rates of the first stage, its states in `folder`."""
    model = tiny.build_model(tiny.SEED)
    optim = tiny.tiny_one().optim
    compute = ComputeConfig(device="cpu", activation_checkpointing=False)
    return Trainer(
        model,
        TrainerConfig(n_steps=n_steps, optim=optim, compute=compute),
        forward=Forward(model, attention="dense"),
        states=RunState(folder, is_async=False),
        show=partial(append_figures, folder),
        lessons=tiny.make_lessons(model),
    )


def picture_batches(tokenizing: Tokenizing, seeds: Sequence[int]) -> list[Batch]:
    """A batch of two drawn pictures for each seed."""
    batches = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        batches.append(collate([tokenizing(image_example(rng)) for _ in range(2)]))
    return batches


def write_tiny_settings(folder: Path) -> None:
    """What a checkpoint of the run in `folder` is made of beside its weights."""
    save_settings(
        folder / RUN_SETTINGS,
        config=tiny.tiny_config(),
        tokenizer=load_vocabulary().for_transformers(),
        images=tiny.IMAGES,
        videos=tiny.VIDEOS,
    )
