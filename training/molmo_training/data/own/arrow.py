"""Parquet files and folders of Hugging Face's datasets as records, read with pyarrow.

Folders: what `datasets` wrote with `save_to_disk` (memory-mapped), or Parquet files. Of Parquet the
row groups read last are kept: rows in any order are quick where all fit, or the groups are small.
Knows: forms of files and folders. Does not know: fields of a row.
"""

from __future__ import annotations

import bisect
import importlib
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from molmo_core.errors import DataError, InvalidExample

KEPT_BYTES = 256 << 20
"""Of row groups, of all Parquet files that a process reads."""
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?\.parquet")


class _KeptTables:
    """The tables read last; one that is larger than `KEPT_BYTES` is kept alone."""

    def __init__(self) -> None:
        self._tables: dict[tuple[object, int], Any] = {}

    def get(self, key: tuple[object, int], read: Callable[[], Any]) -> Any:
        table = self._tables.pop(key, None)
        if table is None:
            table = read()
            while self._tables and self._n_bytes() + table.nbytes > KEPT_BYTES:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = table
        return table

    def _n_bytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())


_KEPT = _KeptTables()


class ParquetRecords:
    """The rows of Parquet files, one file after the other."""

    def __init__(self, paths: list[Path]) -> None:
        """Reads the files' ends. Raises DataError for what is no Parquet file."""
        self.paths = paths
        self._ends_of_files = [self._opened(path).metadata for path in paths]
        self._groups = [
            (number, group)
            for number, end in enumerate(self._ends_of_files)
            for group in range(end.num_row_groups)
        ]
        rows = (self._ends_of_files[n].row_group(group).num_rows for n, group in self._groups)
        self._ends = list(accumulate(rows))
        self._first_rows = [0, *accumulate(end.num_rows for end in self._ends_of_files)]
        self._opening = object()  # of which kept tables are: a file may be another one later

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, index: int, field: str | None = None) -> str:
        number, _ = self._groups[self._group_of(index)]
        place = f"{self.paths[number].name}:row {index - self._first_rows[number]}"
        return place if field is None else f"{place}:{field}"

    def record(self, index: int) -> Any:
        """Raises InvalidExample when the row group cannot be read."""
        group = self._group_of(index)
        table = _KEPT.get((self._opening, group), partial(self._read, group))
        first = self._ends[group - 1] if group else 0
        return _record_of(table, index - first, self.where(index))

    def column(self, name: str) -> Any:
        """One field of all rows, as Arrow has it; of the files no other is read."""
        read = _pyarrow("parquet").read_table
        parts = [read(path, columns=[name], use_threads=False) for path in self.paths]
        return _pyarrow("").concat_tables(parts).column(0)

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect.bisect_right(self._ends, index)

    def _read(self, group: int) -> Any:
        number, inside = self._groups[group]
        file = self._opened(self.paths[number], self._ends_of_files[number])
        try:
            return file.read_row_group(inside, use_threads=False)
        except (OSError, ValueError) as error:
            raise InvalidExample(
                f"{self.paths[number].name}: row group {inside} cannot be read ({error}); "
                "get the file anew"
            ) from error

    def _opened(self, path: Path, end: Any = None) -> Any:
        """`end`: what is known of the file already."""
        try:
            # A buffer ahead of all columns doubles the time of a small group.
            return _pyarrow("parquet").ParquetFile(path, metadata=end, pre_buffer=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no complete Parquet file ({error})") from error


class ArrowRecords:
    """A dataset as `save_to_disk` of Hugging Face's datasets writes it."""

    def __init__(self, folder: Path) -> None:
        """Maps the files. Raises DataError for a folder that is not complete."""
        self.folder = folder
        state = _json_of(folder / STATE_FILE)
        if state.get("_indices_data_files"):
            raise DataError(f"{folder} has its rows chosen by a list: save it with flatten_indices")
        self._names = [entry["filename"] for entry in state.get("_data_files", [])]
        self._tables = self._mapped()
        self._ends = list(accumulate(table.num_rows for table in self._tables))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, index: int, field: str | None = None) -> str:
        place = f"{self.folder.name}:row {index}"
        return place if field is None else f"{place}:{field}"

    def record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._ends, index)
        first = self._ends[file - 1] if file else 0
        return _record_of(self._tables[file], index - first, self.where(index))

    def column(self, name: str) -> Any:
        """One field of all rows, as Arrow has it."""
        parts = [table.select([name]) for table in self._tables]
        return _pyarrow("").concat_tables(parts).column(0)

    def _mapped(self) -> list[Any]:
        tables = []
        arrow, ipc = _pyarrow(""), _pyarrow("ipc")
        for name in self._names:
            if Path(name).name != name:
                raise DataError(f"{self.folder / STATE_FILE} names {name!r}; files lie beside it")
            try:
                mapped = arrow.memory_map(str(self.folder / name), "r")
                tables.append(ipc.open_stream(mapped).read_all())
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.folder / name} is no complete Arrow file ({error})"
                ) from error
        return tables

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._tables = self._mapped()


def open_folder(folder: Path) -> ParquetRecords | ArrowRecords:
    """The rows of a folder. Raises DataError when it holds no dataset, or several splits."""
    if (folder / STATE_FILE).exists():
        return ArrowRecords(folder)
    if (folder / SPLITS_FILE).exists():
        _refuse_splits(folder, sorted(_json_of(folder / SPLITS_FILE).get("splits", [])))
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} holds no dataset: expected *.parquet, or {STATE_FILE} with Arrow files "
            "(save_to_disk)"
        )
    splits = {match["split"] if (match := _SHARD.fullmatch(f.name)) else "" for f in files}
    if len(splits) > 1:
        _refuse_splits(folder, sorted(splits))
    return ParquetRecords(files)


def split_files(path: Path) -> list[Path]:
    """The files of FOLDER/SPLIT where the split is the beginning of names, not a folder."""
    if path.exists() or not path.parent.is_dir():
        return []
    matches = [(file, _SHARD.fullmatch(file.name)) for file in path.parent.rglob("*.parquet")]
    return sorted(file for file, match in matches if match and match["split"] == path.name)


def _refuse_splits(folder: Path, splits: list[str]) -> None:
    raise DataError(
        f"{folder} holds the splits {', '.join(map(str, splits))}: give one, as "
        f"{folder.name}/{splits[0] if splits else 'train'}"
    )


def _record_of(table: Any, place: int, where: str) -> Any:
    try:
        return table.slice(place, 1).to_pylist(maps_as_pydicts="strict")[0]
    except (ValueError, LookupError) as error:
        raise InvalidExample(f"{where}: it cannot be read ({error}): write it anew") from error


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no object in JSON")
    return found


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet and Arrow files are read with pyarrow, which is not installed; install it "
            "with: pip install 'molmo-serve[training]'"
        ) from error
