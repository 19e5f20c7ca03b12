"""The processes of a run, talking over the CPU in a group of their own.

Knows: process groups, that failures of one rank are told on all. Does not know: what is said.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from molmo_core.errors import MolmoError, TrainingError
from molmo_training.checkpoints.wording import first_line

_PATIENCE = timedelta(hours=2)
"""Ranks wait for each other's writes, and for what rank 0 does with a new state."""
_T = TypeVar("_T")


class Ranks:
    """This process among those of the run; every rank makes one, and calls it alike.

    The group is its own, so that what is said behind the training never meets the training's.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE) if is_distributed else None
        self.rank = dist.get_rank() if is_distributed else 0
        self.size = dist.get_world_size() if is_distributed else 1

    def on_first(self, work: Callable[[], _T]) -> _T:
        """What rank 0 makes of `work`, on all ranks; what it raises, too."""
        outcome: list[Any] = list(_outcome(work)) if self.rank == 0 else [None, None]
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        result: _T = outcome[0]
        return result

    def on_all(self, work: Callable[[], _T]) -> _T:
        """What this rank makes of its own `work`; what one rank raises, on all of them."""
        outcome = _outcome(work)
        for error in (outcome[1], *self.gather(outcome[1])):
            if error is not None:
                raise error
        result: _T = outcome[0]
        return result

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, is_wanted: bool) -> bool:
        """Whether one of the ranks says so."""
        if self.group is None:
            return is_wanted
        votes = torch.tensor(int(is_wanted))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return bool(votes)


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What the work makes, or raises: the other ranks wait for an answer."""
    try:
        return work(), None
    except (OSError, MolmoError) as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - a rank that waits would wait for ever
        told = TrainingError(reason_of(error))
        told.__cause__ = error  # where it happened is told on this rank
        return None, told


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line; of what torch raises for all ranks, on the first that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {reason_of(failure)}"
    name, line = type(error).__name__, first_line(error)
    return line if line == name else f"{name}: {line}"
