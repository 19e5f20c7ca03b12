"""The processes of a run, talking over the CPU in a group of their own.

Knows: process groups, that failures of one rank are told on all. Does not know: what is said.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from molmo_core.errors import MolmoError, TrainingError
from molmo_training.runs.tensors import reason_of

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
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (OSError, MolmoError) as error:
                outcome[1] = error
            except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer
                outcome[1] = TrainingError(reason_of(error))
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
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
