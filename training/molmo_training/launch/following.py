"""What follows a saved state: its publication, and the evaluation of what was published.

Knows: the store, a command. Does not know: training, what the command measures.
"""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from types import TracebackType

import torch

from molmo_core.checkpoints import open_store
from molmo_core.errors import CheckpointError
from molmo_training.checkpoints.publish import publish, store_cache
from molmo_training.train_config import SavingConfig

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations"


class Following:
    """Called on rank 0, behind the training. On leaving it waits for an evaluation that runs."""

    def __init__(self, config: SavingConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Following:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._running is not None and self._running.wait():
            logger.warning("the last evaluation ended with code %d", self._running.returncode)

    def saved(self, state: Path) -> None:
        """Publish the state; a failure is told in the log and ends nothing."""
        config = self._config
        if config.publish_to is None:
            return
        try:
            manifest = publish(
                state,
                open_store(config.publish_to, cache=store_cache()),
                name=config.publish_name,
                keep=config.publish_keep,
                dtype=torch.bfloat16,
            )
        except (CheckpointError, OSError) as error:  # a store that is away
            logger.error("%s is not published: %s", state.name, error)
            return
        except Exception:  # the training does not depend on it
            logger.exception("%s is not published", state.name)
            return
        if config.evaluation:
            self._evaluate(manifest.id, manifest.step)

    def _evaluate(self, checkpoint: str, step: int | None) -> None:
        if self._running is not None and self._running.poll() is None:
            logger.warning("%s is not evaluated: the evaluation before is not done", checkpoint)
            return
        command = [
            part.replace("{checkpoint}", checkpoint).replace("{step}", str(step))
            for part in self._config.evaluation
        ]
        output = self._folder / EVALUATIONS / f"{checkpoint}.txt"
        output.parent.mkdir(exist_ok=True)
        try:
            with output.open("wb") as file:
                self._running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        except OSError as error:
            logger.warning("%s is not evaluated: %s", checkpoint, error)
