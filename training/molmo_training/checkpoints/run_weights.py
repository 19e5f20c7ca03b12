"""The weights of a run of ours: of a saved step, or of the one file that earlier runs had.

A run has `model/` (a released folder without weights) and `step*/`, or a `state.pt`.

Knows: where a run keeps what. Does not know: configuration, tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import LoadedWeights, Weights
from molmo_training.checkpoints.native_weights import ShardedWeights
from molmo_training.runs.step_folder import TENSORS, latest_step, missing_of, step_folder, step_of

RUN_STATE, RUN_SETTINGS = "state.pt", "model"


def is_run_state(folder: Path) -> bool:
    return step_of(folder) is not None or (folder / RUN_STATE).exists()


def last_state(run: Path) -> Path | None:
    """The last step of which the run has a whole state."""
    if all(step_of(child) is None for child in run.iterdir()):
        return None
    step = latest_step(run)
    return None if step is None else step_folder(run, step)


def settings_of(folder: Path) -> Path:
    """The released folder without weights that belongs to a state."""
    run = folder if step_of(folder) is None else folder.parent
    return run / RUN_SETTINGS


def run_weights(folder: Path) -> tuple[Weights, int]:
    """Weights, tensor by tensor, and step. Raises CheckpointError for a state that was cut."""
    step = step_of(folder)
    if step is not None:
        if missing := missing_of(folder):
            raise CheckpointError(
                f"{folder.name!r} is no whole state: {missing}; copy it again or take another step"
            )
        return ShardedWeights(folder / TENSORS), step
    state = torch.load(folder / RUN_STATE, weights_only=True, map_location="cpu", mmap=True)
    return LoadedWeights(state["model"]), int(state["step"])
