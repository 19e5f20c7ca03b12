"""Files of datasets as tables: where they lie in the data folder, opened when they are asked.

Every function says at once what is missing (`MissingFiles`) and reads nothing before a row or the
length is asked. Parquet and Arrow files tell their length; other tables are read for it once, and
again when their files have changed. In the data folder: `torch_datasets` (pictures),
`video_datasets`, and `hub`, with repositories of Hugging Face by name; those in its own cache are
found too.
Knows: folders, Parquet, Arrow, JSON, CSV. Does not know: what is in a row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from molmo_core.errors import DataError
from molmo_training.data.formatting.row import Row
from molmo_training.data.own.arrow import STATE_FILE, ArrowRecords, ParquetRecords
from molmo_training.data.rows import RowTable
from molmo_training.datasets.registry import MissingFiles
from molmo_training.datasets.tables import LazyTable, ListedRows


def pictures_folder(root: Path) -> Path:
    return root / "torch_datasets"


def videos_folder(root: Path) -> Path:
    return root / "video_datasets"


def need(path: Path) -> Path:
    """The path. Raises MissingFiles when nothing is there."""
    if not path.exists():
        raise MissingFiles(f"{path} is missing")
    return path


@dataclass(frozen=True)
class RecordRows:
    """Records of Parquet or Arrow files as rows."""

    records: ParquetRecords | ArrowRecords

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int) -> Row:
        row: Row = self.records.record(index)
        return row

    def column(self, name: str) -> Any:
        """An Arrow column."""
        return self.records.column(name)


Read = Callable[[RecordRows], RowTable]
"""Makes another table of the rows of files."""


def hub_steps(repo: str) -> str:
    """How a repository of Hugging Face comes into the data folder."""
    return f"Run: hf download {repo} --repo-type dataset --local-dir {{root}}/hub/{repo}."


def hub_table(
    root: Path,
    repo: str,
    split: str,
    *,
    config: str | None = None,
    read: Read | None = None,
    beside: Sequence[Path] = (),
) -> LazyTable:
    """A split of a repository, its files CONFIG/SPLIT-*.parquet in any folder; `read` makes
    another table of it, whose length may follow from what is `beside`, too."""
    pattern = f"{split}-*.parquet" if config is None else f"{config}/{split}-*.parquet"
    files = sorted((root / "hub" / repo).rglob(pattern)) or _cached(repo, pattern)
    if not files:
        raise MissingFiles(f"{root / 'hub' / repo} has no {pattern}")
    return LazyTable(partial(_parquet, files, read), counted=[*files, *beside] if read else ())


def _cached(repo: str, pattern: str) -> list[Path]:
    """The files in Hugging Face's own cache; none where it lacks some of them."""
    patterns = [pattern, f"*/{pattern}"]
    try:
        folder = snapshot_download(
            repo, repo_type="dataset", allow_patterns=patterns, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return []
    return sorted(Path(folder).rglob(pattern))


def _parquet(files: Sequence[Path], read: Read | None) -> RowTable:
    rows = RecordRows(ParquetRecords(list(files)))
    return rows if read is None else read(rows)


def saved_table(folder: Path, split: str, *, read: Read | None = None) -> LazyTable:
    """A split that `save_to_disk` of Hugging Face's datasets wrote."""
    place = folder / split
    need(place / STATE_FILE)
    counted = [place / STATE_FILE, *sorted(place.glob("*.arrow"))]
    return LazyTable(partial(_arrow, place, read), counted=counted if read else ())


def _arrow(folder: Path, read: Read | None) -> RowTable:
    rows = RecordRows(ArrowRecords(folder))
    return rows if read is None else read(rows)


def json_table(path: Path, read: Callable[[Any], Sequence[Row]]) -> LazyTable:
    """Rows that a function makes of what a JSON file holds."""
    return LazyTable(partial(_json, path, read), counted=[need(path)])


def _json(path: Path, read: Callable[[Any], Sequence[Row]]) -> ListedRows:
    return ListedRows(read(read_json(path)))


def read_json(path: Path) -> Any:
    """Raises DataError for what is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): get the file anew") from error


def csv_table(path: Path, read: Callable[[Mapping[str, str]], Row]) -> LazyTable:
    """A row of each line of a CSV file with a header."""
    return LazyTable(partial(_csv, path, read), counted=[need(path)])


def _csv(path: Path, read: Callable[[Mapping[str, str]], Row]) -> ListedRows:
    with path.open(newline="", encoding="utf-8") as file:
        return ListedRows([read(line) for line in csv.DictReader(file)])


def below(folder: Path, relative: Any) -> Path:
    """A path that a row names inside a folder. Raises DataError for one that leads out of it."""
    path = PurePosixPath(str(relative))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"a row names {str(relative)[:80]!r}, which is not below {folder}")
    return folder / path


def listed(value: Any) -> list[Any]:
    """A list; of a mapping of lists, as Hugging Face keeps lists of objects, the objects."""
    if not isinstance(value, Mapping):
        return list(value)
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
