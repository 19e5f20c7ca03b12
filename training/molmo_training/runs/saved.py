"""What the saved states of a run say beside their tensors, and which may be written.

Knows: the documents of a state. Does not know: tensors, ranks, who saves.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_core.errors import CheckpointError, TrainingError
from molmo_training.checkpoints.origin import Origin, read_origin
from molmo_training.runs import step_folder as folders

DATA, PROGRESS, CONFIG = "data.json", "progress.json", "training.json"
OPTIMIZERS, RANDOM = "optimizers.json", "random.json"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a state says beside its tensors. `data` is merged over the ranks that saved."""

    folder: Path
    step: int
    data: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    world_size: int
    origin: Origin | None
    """Where the frozen weights are; None: in the state."""


def read_saved(run: Path, step: int | None) -> Saved | None:
    if step is None and (step := folders.latest_step(run)) is None:
        return None
    folder = folders.step_folder(run, step)
    if missing := folders.missing_of(folder):
        raise CheckpointError(
            f"there is no whole state of step {step} ({missing}); whole are those of steps "
            f"{folders.whole_steps(run)}"
        )
    return Saved(
        folder=folder,
        step=step,
        data=folders.read_json(folder, DATA),
        progress=folders.read_json(folder, PROGRESS),
        config=folders.read_json(folder, CONFIG),
        world_size=folders.read_json(folder, folders.COMPLETE)["world_size"],
        origin=read_origin(folder),
    )


def check_is_new(run: Path, step: int) -> None:
    last = folders.latest_step(run)
    if last is not None and last >= step:
        raise TrainingError(
            f"step {step} is to be saved in {run.name!r}, which has a state of step {last}: go on "
            "from that one, take another folder, or remove what came later (`discard_after`)"
        )


def check_room(run: Path, n_bytes: int) -> None:
    """Raises TrainingError when a state of so many bytes does not fit on the run's disk."""
    run.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run).free
    if free < n_bytes:
        raise TrainingError(
            f"a state takes about {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on the disk "
            f"of {run.name!r}: make room, or train in another folder"
        )


def remove_after(run: Path, step: int) -> None:
    for later in [s for s in folders.whole_steps(run) if s > step]:
        folders.remove_step(run, later)
