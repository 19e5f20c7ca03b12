"""Tables whose rows are drawn: row number n is the same for ever, splits share nothing.

Knows: generators of rows. Does not know: scenes, questions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo_training.data.formatting.row import Row
from molmo_training.data.rows import RowTable
from molmo_training.datasets.registry import dataset

N_ROWS = {"train": 200_000, "validation": 2_000}
"""Of an epoch; any number has a row."""

Draw = Callable[[np.random.Generator], Row]


@dataclass(frozen=True)
class DrawnTable:
    """Rows that a function draws, each from its own generator."""

    name: str
    split: str
    draw: Draw

    def __len__(self) -> int:
        return N_ROWS[self.split]

    def row(self, index: int) -> Row:
        own = [zlib.crc32(self.name.encode()), zlib.crc32(self.split.encode()), index]
        return self.draw(np.random.default_rng(own))


def register_drawn(name: str, draw: Draw, *groups: str) -> None:
    """Make a dataset of a function that draws a row."""

    @dataset(
        name=name,
        groups=("drawn", *groups),
        source="drawn by this project",
        splits=tuple(N_ROWS),
        licence="Apache-2.0",
    )
    def _(root: Path, split: str) -> RowTable:
        return DrawnTable(name, split, draw)
