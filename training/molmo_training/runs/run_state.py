"""Everything that a training run needs to go on, saved while it goes on.

A save copies weights and optimizer states to memory of the CPU and writes them behind the
training; the next save waits for it. A state is found when it is whole (`step_folder`), so that
whatever is killed or fails, the one before stays. Failures are raised on every rank at the next
call, never swallowed; training may go on after them.

Knows: processes (none, or a process group), what belongs to a state. Does not know: what data and
progress mean, when to save. The folder has to be one that all ranks see.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from molmo_core.errors import MolmoError, TrainingError
from molmo_training.checkpoints.origin import ORIGIN, Origin
from molmo_training.data.stream import merge_states
from molmo_training.runs import step_folder as folders
from molmo_training.runs.random_states import random_state, restore_random_state, seed_new_rank
from molmo_training.runs.ranks import Ranks, reason_of
from molmo_training.runs.saved import (
    CONFIG,
    DATA,
    OPTIMIZERS,
    PROGRESS,
    RANDOM,
    Saved,
    check_is_new,
    check_room,
    read_saved,
    remove_after,
)
from molmo_training.runs.tensors import (
    joined,
    model_tensors,
    optimizer_document,
    optimizer_tensors,
    restore_tensors,
    save_tensors,
    state_bytes,
)

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """A state on its way to the disk."""

    step: int
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Any]
    """Documents that are the same on all ranks."""
    data: Mapping[str, Any]
    random: Mapping[str, Any]


def merged(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The data state of a run from those of its ranks: of lanes, or equal on all.

    Raises TrainingError when they are neither.
    """
    found = [dict(state) for state in states]
    if all("lanes" in state for state in found):
        return merge_states(found)
    if any(state != found[0] for state in found):
        raise TrainingError(
            "the data states of the ranks differ and have no lanes: give states that are the same "
            "on all ranks, or of lanes"
        )
    return found[0]


class RunState:
    """Saves and restores the state of the run in `folder`; every rank makes one and calls it.

    `keep` newest states stay, all without it. With `origin`, which has the frozen weights, states
    hold only what is trained; who restores one has put the others there. `on_saved` is called on
    rank 0 with the folder of each new state, behind the training, before older ones are removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None = None,
        is_async: bool = True,
        on_saved: Callable[[Path], object] | None = None,
        origin: Origin | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise TrainingError(f"keep is {keep}; at least 1 state has to stay, or None for all")
        self.folder, self.keep, self.is_async = folder, keep, is_async
        self._on_saved, self._origin = on_saved, origin
        self._ranks = Ranks()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="run-state")
        self._writing: Future[None] | None = None
        self._at: int | None = None
        has_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(has_gpu, False, False, has_gpu))

    def latest(self) -> int | None:
        """The last step whose state is whole. No other rank is asked."""
        return folders.latest_step(self.folder)

    def check_room(
        self,
        *,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        beside: nn.Module | None = None,
    ) -> None:
        """Raise TrainingError, on every rank, unless the disk has room for one state more."""
        both = joined(model, beside)
        n_bytes = state_bytes(both, optimizers, with_frozen=self._origin is None)
        self._ranks.on_first(lambda: check_room(self.folder, n_bytes))

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        beside: nn.Module | None = None,
        data: Mapping[str, Any],
        progress: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """Save the state after `step` steps; returns when nothing of it can change any more.

        `beside` is trained with the model and no part of it; `data` is this rank's, the other
        mappings are the same on all ranks; all are JSON. What this object saved or restored last
        is not saved again. Raises TrainingError: for the save before this one, or for this one.
        """
        self.wait()
        if step == self._at:
            return
        self._ranks.on_first(lambda: check_is_new(self.folder, step))
        both = joined(model, beside)
        staged = self._ranks.on_all(
            lambda: _Staged(
                step=step,
                tensors=self._tensors(both, optimizers),
                shared={
                    CONFIG: _json_copy(config),
                    PROGRESS: _json_copy(progress),
                    OPTIMIZERS: _json_copy(optimizer_document(both, optimizers)),
                    **({} if self._origin is None else {ORIGIN: self._origin.document()}),
                },
                data=_json_copy(data),
                random=random_state(),
            )
        )
        self._writing = self._writer.submit(self._write, staged)
        if not self.is_async:
            self.wait()

    def _tensors(self, both: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Weights and optimizer states: copies where they are written behind the training."""
        weights = model_tensors(both, with_frozen=self._origin is None)
        tensors = weights | optimizer_tensors(both, optimizers)
        return cast(dict[str, Tensor], self._stager.stage(tensors)) if self.is_async else tensors

    def wait(self) -> None:
        """Until the last save is on disk. Raises TrainingError when it failed, on every rank."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait, and let go of memory and thread. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._stager.close()

    def saved(self, step: int | None = None) -> Saved | None:
        """What the state of `step`, or the last whole one, says; None when there is none at all.

        Every rank has to ask. Raises CheckpointError when `step` has no whole state.
        """
        self.wait()
        return self._ranks.on_first(lambda: read_saved(self.folder, step))

    def discard_after(self, step: int) -> None:
        """Remove the states after `step`, to go on from an earlier one. Every rank has to ask."""
        self.wait()
        self._ranks.on_first(lambda: remove_after(self.folder, step))

    def restore(
        self,
        *,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        beside: nn.Module | None = None,
        step: int | None = None,
    ) -> Saved | None:
        """Put modules, optimizers and random generators back; None when there is no state.

        The number of ranks may be another one than at the save. Without optimizers weights alone
        are restored. Raises CheckpointError: the step is not there, of another model or damaged.
        """
        saved = self.saved(step)
        if saved is None:
            return None
        folder = saved.folder
        document, ranks = self._ranks.on_all(
            lambda: [folders.read_json(folder, name) for name in (OPTIMIZERS, RANDOM)]
        )
        restore_tensors(
            folder / folders.TENSORS,
            joined(model, beside),
            optimizers,
            document,
            self._ranks,
            with_frozen=saved.origin is None,
        )
        if self._ranks.rank < len(ranks):
            restore_random_state(ranks[self._ranks.rank])
        else:
            seed_new_rank(saved.step, self._ranks.rank)
        self._at = saved.step
        return saved

    def _write(self, staged: _Staged) -> None:
        """Behind the training, on all ranks. Raises TrainingError on all."""
        partial = folders.partial_folder(self.folder, staged.step)
        try:
            self._ranks.on_first(lambda: folders.start_partial(self.folder, staged.step))
            save_tensors(partial / folders.TENSORS, staged.tensors, self._ranks)
            files = self._ranks.on_all(lambda: _files_of(partial, self._ranks.rank))
            parts = self._ranks.gather((files, staged.data, staged.random))
            folder = self._ranks.on_first(lambda: self._complete(staged, parts))
        except (OSError, CheckpointException, MolmoError) as error:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(self._not_saved(staged.step, error)) from error
        self._at = staged.step  # whatever follows: the state is whole
        try:
            self._ranks.on_first(lambda: self._follow(folder))
        except (OSError, MolmoError) as error:
            raise TrainingError(
                f"{folder.name} is saved; what was to follow on it failed ({reason_of(error)})"
            ) from error

    def _complete(self, staged: _Staged, parts: Sequence[tuple[list[str], Any, Any]]) -> Path:
        """On rank 0: `parts` are files, data state and random state of each rank."""
        files, data, random = zip(*parts, strict=True)
        partial = folders.partial_folder(self.folder, staged.step)
        if unseen := sorted(set().union(*files) - set(_files_of(partial))):
            raise TrainingError(
                f"rank 0 does not see {unseen[0]}, which another rank has written; the run's "
                "folder has to be one that all ranks share"
            )
        documents = {**staged.shared, DATA: merged(data), RANDOM: list(random)}
        return folders.complete(self.folder, staged.step, documents, world_size=self._ranks.size)

    def _follow(self, folder: Path) -> None:
        """What a new state is for, and what it makes superfluous."""
        logger.info("%s is saved", folder.name)
        try:
            if self._on_saved is not None:
                self._on_saved(folder)
        finally:
            self._make_room()

    def _make_room(self) -> None:
        """Remove what is superfluous now."""
        folders.remove_hidden(self.folder)
        if self.keep is not None:
            for step in folders.whole_steps(self.folder)[: -self.keep]:
                folders.remove_step(self.folder, step)

    def _not_saved(self, step: int, error: BaseException) -> str:
        last = folders.latest_step(self.folder)
        stands = "no state is there yet" if last is None else f"that of step {last} stands"
        if not _is_full(error):
            return f"the state of step {step} is not saved ({reason_of(error)}); {stands}"
        return (
            f"the state of step {step} is not saved, the disk of {self.folder.name!r} is full; "
            f"{stands}. Make room or keep fewer states; the training may go on and save again"
        )


def _files_of(partial: Path, rank: int | None = None) -> list[str]:
    """The files of tensors that a rank has written, or of all that this rank sees."""
    pattern = "__*" if rank is None else f"__{rank}_*"
    return [path.name for path in (partial / folders.TENSORS).glob(pattern)]


def _json_copy(document: Mapping[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(document))
    return copy


def _is_full(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):
        return any(_is_full(failure) for failure, _ in error.failures.values())
    return isinstance(error, OSError) and error.errno in _FULL
