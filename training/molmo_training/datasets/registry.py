"""The datasets by name: what they are, where they come from, how their rows are opened.

A dataset is a function from the data folder and a split to a table, marked with `@dataset`. It says
at once which files are missing, and reads none before its table is asked.
Knows: names, groups, splits, licences, what to do for missing files. Does not know: files, rows.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molmo_core.errors import DataError
from molmo_training.data.rows import RowTable

DATA_FOLDER_VARIABLE = "MOLMO_DATA_DIR"

Open = Callable[[Path, str], RowTable]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`manual` says how the files come into the data folder, which stands in it as `{root}`."""

    name: str
    groups: tuple[str, ...]
    source: str
    splits: tuple[str, ...]
    licence: str
    manual: str
    open: Open

    def table(self, root: Path, split: str) -> RowTable:
        """Raises DataError for an unknown split, and for missing files with what to do."""
        if split not in self.splits:
            raise DataError(
                f"the dataset {self.name} has no split {split}; it has {', '.join(self.splits)}"
            )
        try:
            return self.open(root, split)
        except MissingFiles as error:
            steps = self.manual.replace("{root}", str(root))
            raise DataError(
                f"the dataset {self.name} ({split}) is not complete: {error.message}. "
                f"Source: {self.source}. {steps}"
            ) from error


class MissingFiles(DataError):
    """Files of a dataset are not where they are looked for."""


@dataclass(frozen=True, kw_only=True)
class SplitStatus:
    """A split on this machine. `n_rows` is None where it is missing or was not counted."""

    split: str
    is_present: bool
    reason: str = ""
    n_rows: int | None = None


_DATASETS: dict[str, Dataset] = {}


def dataset(
    *,
    name: str,
    groups: tuple[str, ...],
    source: str,
    splits: tuple[str, ...],
    licence: str,
    manual: str = "",
) -> Callable[[Open], Open]:
    """Register the function that opens a dataset. Raises ValueError for a name taken."""

    def register(function: Open) -> Open:
        if name in _DATASETS:
            raise ValueError(f"two datasets have the name {name}")
        _DATASETS[name] = Dataset(
            name=name,
            groups=groups,
            source=source,
            splits=splits,
            licence=licence,
            manual=manual,
            open=function,
        )
        return function

    return register


def all_datasets() -> tuple[Dataset, ...]:
    """By name."""
    return tuple(_DATASETS[name] for name in sorted(_DATASETS))


def find_dataset(name: str) -> Dataset:
    """Raises DataError with near names for an unknown one."""
    found = _DATASETS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _DATASETS, n=4, cutoff=0.5)
        hint = f"near are {', '.join(near)}" if near else "`molmo data list` names all"
        raise DataError(f"there is no dataset {name}; {hint}")
    return found


def open_dataset(name: str, root: Path, split: str = "train") -> RowTable:
    """The rows of a split. Raises DataError."""
    return find_dataset(name).table(root, split)


def data_folder(given: Path | None = None) -> Path:
    """The folder of all datasets: as given, else of the environment, else `data`."""
    return given or Path(os.environ.get(DATA_FOLDER_VARIABLE) or "data")


def status_of(found: Dataset, root: Path, *, count: bool = True) -> tuple[SplitStatus, ...]:
    """Each split with why it is missing; counting rows may have to read tables."""
    return tuple(_split_status(found, root, split, count=count) for split in found.splits)


def _split_status(found: Dataset, root: Path, split: str, *, count: bool) -> SplitStatus:
    try:
        table = found.table(root, split)
        n_rows = len(table) if count else None
    except DataError as error:
        return SplitStatus(split=split, is_present=False, reason=error.message)
    return SplitStatus(split=split, is_present=True, n_rows=n_rows)
