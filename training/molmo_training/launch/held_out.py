"""Held-out examples in packs: each once, the same ones each time, on any number of ranks.

Knows: sizes of examples, which rank looks at which packs. Does not know: losses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from molmo_core.errors import DataError, MolmoError
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
            rows = [self._row(pack) for pack in mine[begin : begin + self.packs_per_batch]]
            yield collate(rows or [_weightless(self._row(self._packs[0]))])

    @cached_property
    def _packs(self) -> list[list[int]]:
        packer: Packer[int] = Packer(self.budgets, self.buffer_size)
        packs: list[list[int]] = []
        for index in range(min(self.n_examples, len(self.source))):
            try:
                packer.add(self._made(index).size, index)
            except (MolmoError, ValueError, OSError) as error:
                logger.warning("%s[%d] is not looked at: %s", self.name, index, error)
            if packer.is_full:
                packs.append([number for _, number in packer.pop()])
        while packer.waiting:
            packs.append([number for _, number in packer.pop()])
        if not packs:
            raise DataError(f"no example of the held-out set {self.name} can be used")
        return packs

    def _made(self, index: int) -> SizedRow:
        return self.source.make(index, np.random.default_rng(index))

    def _row(self, pack: list[int]) -> Tokenized:
        return pack_rows([self._made(index).row() for index in pack])


def _weightless(row: Tokenized) -> Tokenized:
    return replace(row, weights=np.zeros_like(row.weights))
