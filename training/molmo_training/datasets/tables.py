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


class LazyTable:
    """Reads its table when it is first asked, in each process for itself; a length that is known
    goes along to other processes, so that they read only tables of which they need rows."""

    def __init__(self, read: Callable[[], RowTable]) -> None:
        self.read = read
        self._n_rows: int | None = None

    @cached_property
    def _table(self) -> RowTable:
        return self.read()

    def __len__(self) -> int:
        if self._n_rows is None:
            self._n_rows = len(self._table)
        return self._n_rows

    def row(self, index: int) -> Row:
        return self._table.row(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"read": self.read, "_n_rows": self._n_rows}


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
    """Some rows of a table."""

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
