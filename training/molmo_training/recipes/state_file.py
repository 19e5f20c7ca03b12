"""The state of a run of one process in one file, `state.pt`, which is replaced as a whole.

Knows: the file. Does not know: what states are of, when they are saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    step: int
    data: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]


class StateFile:
    """`on_saved` is called with the run's folder after each save."""

    def __init__(self, folder: Path, on_saved: Callable[[Path], object] | None = None) -> None:
        self.folder, self._on_saved = folder, on_saved
        self._at: int | None = None

    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        beside: nn.Module | None,
        data: Mapping[str, Any],
        progress: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        if step == self._at:
            return
        state = {
            "model": model.state_dict(),
            "beside": None if beside is None else beside.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "data": dict(data),
            "progress": dict(progress),
            "config": dict(config),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".pt.partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        self._at = step
        if self._on_saved is not None:
            self._on_saved(self.folder)

    def saved(self) -> SavedFile | None:
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True, mmap=True)
        return SavedFile(**{name: state[name] for name in ("step", "data", "progress", "config")})

    def restore(
        self,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        beside: nn.Module | None,
    ) -> SavedFile | None:
        saved = self.saved()
        if saved is None:
            return None
        state = torch.load(self.path, weights_only=True)
        model.load_state_dict(state["model"])
        if beside is not None:
            beside.load_state_dict(state["beside"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        self._at = saved.step
        return saved

    def wait(self) -> None:
        """Nothing to wait for: saves are done when they return."""
