"""Tables made of other tables: opened when asked, mapped, chosen, repeated, joined.

Knows: rows by number. Does not know: files, datasets, what is in a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable


@dataclass(frozen=True)
class ListedRows:
    """Rows in memory."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]


@dataclass(frozen=True)
class LazyTable:
    """Reads its table when it is first asked, in each process for itself."""

    read: Callable[[], RowTable]

    @cached_property
    def _table(self) -> RowTable:
        return self.read()

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Row:
        return self._table.row(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"read": self.read}


@dataclass(frozen=True)
class MappedRows:
    """Each row of a table through a function of its own."""

    table: RowTable
    function: Callable[[Row], Row]

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Row:
        return self.function(self.table.row(index))


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a table, each with what is laid over it."""

    table: RowTable
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def row(self, index: int) -> Row:
        return self.table.row(int(self.chosen[index]))


@dataclass(frozen=True)
class RepeatedRows:
    """A table several times over, each time through another function."""

    table: RowTable
    functions: Sequence[Callable[[Row], Row]]

    def __len__(self) -> int:
        return len(self.table) * len(self.functions)

    def row(self, index: int) -> Row:
        time, place = divmod(index, len(self.table))
        return self.functions[time](self.table.row(place))


@dataclass(frozen=True)
class JoinedRows:
    """Tables one after the other."""

    tables: Sequence[RowTable]
    _ends: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._ends.extend(accumulate(len(table) for table in self.tables))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Row:
        which = bisect.bisect_right(self._ends, index)
        return self.tables[which].row(index - (self._ends[which - 1] if which else 0))


def held_out(n_rows: int, n_held: int, seed: int, *, is_held: bool) -> np.ndarray:
    """The numbers of the rows that are held out of training, or of those that are not."""
    order = np.random.default_rng(seed).permutation(n_rows)
    n_held = min(n_held, n_rows // 2)
    return order[:n_held] if is_held else order[n_held:]
