"""Held-out examples in packs: each once, the same ones each time, on any number of ranks.

Knows: sizes of examples, which rank looks at which packs. Does not know: losses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from molmo_core.errors import DataError
from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.lanes import RowSource, SizedRow
from molmo_training.data.loader import collate
from molmo_training.data.packing import Budgets, Packer, pack_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldOutPacks:
    """The first `n_examples` of a dataset, or all it has. Packs are found once, by sizes alone."""

    name: str
    source: RowSource
    n_examples: int
    budgets: Budgets
    buffer_size: int
    packs_per_batch: int

    def batches(self, rank: int, n_readers: int) -> Iterator[Batch]:
        """The batches of one reader; all readers have as many, the last may not count.

        Raises DataError when no example can be used.
        """
        mine = self._packs[rank::n_readers]
        n_batches = -(-len(self._packs) // (n_readers * self.packs_per_batch))
        for number in range(n_batches):
            begin = number * self.packs_per_batch
            packs = mine[begin : begin + self.packs_per_batch]
            rows = [row for pack in packs if (row := self._row(pack)) is not None]
            yield collate(rows or [self._stand_in])

    @cached_property
    def _packs(self) -> list[list[int]]:
        packer: Packer[int] = Packer(self.budgets, self.buffer_size)
        packs: list[list[int]] = []
        for index in range(min(self.n_examples, len(self.source))):
            try:
                packer.add(self._made(index).size, index)
            except Exception as error:  # noqa: BLE001 - a dataset may do anything
                self._leave_out(index, error)
            if packer.is_full:
                packs.append([number for _, number in packer.pop()])
        while packer.waiting:
            packs.append([number for _, number in packer.pop()])
        if not packs:
            raise DataError(f"no example of the held-out set {self.name} can be used")
        return packs

    def _made(self, index: int) -> SizedRow:
        return self.source.make(index, np.random.default_rng(index))

    def _row(self, pack: list[int]) -> Tokenized | None:
        """The examples of a pack that can be opened; None when none can."""
        rows = []
        for index in pack:
            try:
                rows.append(self._made(index).row())
            except Exception as error:  # noqa: BLE001 - a dataset may do anything
                self._leave_out(index, error)
        return pack_rows(rows) if rows else None

    @cached_property
    def _stand_in(self) -> Tokenized:
        """A row of weight 0, for a reader that has no other. Raises DataError without any."""
        for pack in self._packs:
            if (row := self._row(pack)) is not None:
                return replace(row, weights=np.zeros_like(row.weights))
        raise DataError(f"no example of the held-out set {self.name} can be opened")

    def _leave_out(self, index: int, error: Exception) -> None:
        logger.warning("%s[%d] is not looked at: %s", self.name, index, error)
