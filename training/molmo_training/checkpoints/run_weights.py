"""The weights of a run of ours, of a saved step.

A run has `model/` (a released folder without weights) and `step*/`.

Knows: where a run keeps what. Does not know: configuration, tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import Weights
from molmo_training.checkpoints.native_weights import ShardedWeights
from molmo_training.runs.step_folder import TENSORS, latest_step, missing_of, step_folder, step_of

RUN_SETTINGS = "model"


def is_run_state(folder: Path) -> bool:
    return step_of(folder) is not None


def last_state(run: Path) -> Path | None:
    """The last step of which the run has a whole state."""
    if not any(is_run_state(child) for child in run.iterdir()):
        return None
    step = latest_step(run)
    return None if step is None else step_folder(run, step)


def settings_of(state: Path) -> Path:
    """The released folder without weights that belongs to a state."""
    return state.parent / RUN_SETTINGS


def run_weights(state: Path) -> Weights:
    """Weights, tensor by tensor. Raises CheckpointError for a state that was cut."""
    if missing := missing_of(state):
        raise CheckpointError(
            f"{state.name!r} is no whole state: {missing}; copy it again or take another step"
        )
    return ShardedWeights(state / TENSORS)
