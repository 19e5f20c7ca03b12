"""Where else figures go: TensorBoard by default, Weights & Biases when it is asked for.

Knows: the two libraries, which are imported only here and only when they are used. Does not know:
what the figures are of.
"""

from __future__ import annotations

import importlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_core.errors import TrainingError
from molmo_training.runs.log import JsonLines
from molmo_training.runs.meters import Console, Sink

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
_WANDB_ID = "wandb_id.txt"


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run at Weights & Biases; a run that goes on goes on there, too."""

    project: str
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


def open_sinks(
    folder: Path,
    *,
    max_steps: int,
    first_step: int = 0,
    tensorboard: bool | None = None,
    wandb: WandbConfig | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """Console, `log.jsonl` and what was asked for; what was logged after `first_step` is cut off.

    TensorBoard is written where it is installed, unless said otherwise; `config` is shown at
    Weights & Biases. Raises TrainingError when something that was asked for is not installed.
    """
    log = JsonLines(folder)
    log.cut_after(first_step)
    sinks: list[Sink] = [Console(max_steps=max_steps), log]
    if tensorboard is not False and (board := _tensorboard(folder, first_step, tensorboard)):
        sinks.append(board)
    if wandb is not None:
        sinks.append(_Wandb(folder, wandb, config or {}))
    return sinks


def _tensorboard(folder: Path, first_step: int, is_asked_for: bool | None) -> Sink | None:
    try:
        library = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        if is_asked_for:
            raise TrainingError(
                f"TensorBoard is asked for and not installed ({error}): `pip install tensorboard`, "
                "or leave it out"
            ) from error
        logger.info("TensorBoard is not installed; figures are in log.jsonl only")
        return None
    return _TensorBoard(library.SummaryWriter(folder / TENSORBOARD, purge_step=first_step + 1))


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: WandbConfig, settings: Mapping[str, Any]) -> None:
        try:
            library = importlib.import_module("wandb")
        except ImportError as error:
            raise TrainingError(
                f"Weights & Biases is asked for and not installed ({error}): `pip install wandb`, "
                "or leave it out"
            ) from error
        try:
            self._run = library.init(
                project=config.project,
                entity=config.entity,
                name=config.name,
                group=config.group,
                tags=list(config.tags),
                config=dict(settings),
                dir=str(folder),
                id=_wandb_id(folder),
                resume="allow",
            )
        except library.Error as error:
            raise TrainingError(
                f"Weights & Biases cannot be used ({error}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def write(self, line: Mapping[str, float]) -> None:
        figures = {name: value for name, value in line.items() if name != "step"}
        self._run.log(figures, step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: Path) -> str:
    """The run's own, made once: after a stop it is the same run there."""
    path = folder / _WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
