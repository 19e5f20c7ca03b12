"""Tables made of other tables: opened when asked, mapped, chosen, repeated, joined.

Knows: rows by number. Does not know: files, datasets, what is in a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from molmo_core.errors import DataError
from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.lengths import keep_length, kept_length, key_of


@dataclass(frozen=True)
class ListedRows:
    """Rows in memory."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]


class LazyTable:
    """Reads its table when a row is first asked, in each process for itself.

    Of a table whose length only reading it tells, `counted` are the files that it follows from: it
    is read for that once, and not again before one of them changes (`lengths`). A length that is
    known goes along to other processes.
    """

    def __init__(self, read: Callable[[], RowTable], *, counted: Sequence[Path] = ()) -> None:
        self.read, self.counted = read, counted
        self._n_rows: int | None = None

    @cached_property
    def _table(self) -> RowTable:
        key = self._key()  # of the files before they are read
        table = self.read()
        if key is not None and self._n_rows != len(table):
            keep_length(key, len(table))
        return table

    def _key(self) -> str | None:
        return key_of(self.read, self.counted) if self.counted else None

    def __len__(self) -> int:
        if self._n_rows is None:
            key = self._key()
            kept = None if key is None else kept_length(key)
            self._n_rows = len(self._table) if kept is None else kept
        return self._n_rows

    def row(self, index: int) -> Row:
        """Raises DataError when the table is no longer what was counted."""
        n_rows = len(self._table)
        if self._n_rows not in (None, n_rows):
            raise DataError(
                f"a table has {n_rows} rows, {self._n_rows} were counted: its files have changed "
                "since; begin anew"
            )
        return self._table.row(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"read": self.read, "counted": self.counted, "_n_rows": self._n_rows}


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

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(table) for table in self.tables))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Row:
        which = bisect.bisect_right(self._ends, index)
        return self.tables[which].row(index - (self._ends[which - 1] if which else 0))
