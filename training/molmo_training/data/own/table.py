"""A user's own data as a table of rows: a JSONL or Parquet file, or a folder of Hugging Face's.

Media of a row are paths of files, or bytes where the file holds them. A path is relative to the
folder of the data and stays below it, unless the table is told to allow others: a dataset from
elsewhere must not name files of this machine.
Knows: which reader a path needs, where media lie. Does not know: what is in media, examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from molmo_core.errors import DataError, InvalidExample
from molmo_training.data.formatting.row import Row
from molmo_training.data.own.arrow import ParquetRecords, open_folder, split_files
from molmo_training.data.own.jsonl import JsonlRecords
from molmo_training.data.own.schema import read_row

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_OTHER_PLACES = ("http://", "https://", "s3://", "gs://", "file://", "data:")


class Records(Protocol):
    """What a reader gives: whatever stands in the file, by number."""

    def __len__(self) -> int: ...

    def where(self, index: int, field: str | None = None) -> str:
        """The place of a record in words, as file:line or file:line:column."""
        ...

    def record(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class OwnTable:
    """Rows as the formatter takes them; read when asked for."""

    name: str
    records: Records
    folder: Path
    """Of the data; media are below it."""
    allow_absolute: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int, field: str | None = None) -> str:
        return self.records.where(index, field)

    def row(self, index: int) -> Row:
        """The row, its media as paths or bytes. Raises InvalidExample with file and line."""
        record = self.records.record(index)
        try:
            row = dict(read_row(record))
            for field in ("image", "video"):
                if field in row:
                    row[field] = self._medium(field, row[field])
            if "images" in row:
                row["images"] = [self._medium("images", medium) for medium in row["images"]]
        except InvalidExample as error:
            where = self.where(index, error.param)
            raise InvalidExample(f"{where}: {error.message}", param=error.param) from error
        return row

    def _medium(self, field: str, given: Any) -> Path | bytes:
        if isinstance(given, Mapping):  # as Hugging Face's datasets keep pictures
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes) and given:
            return given
        if not isinstance(given, str) or not given.strip():
            raise InvalidExample(
                f"field {field!r} holds no path and no bytes of a file: give one", param=field
            )
        return self._path(field, given)

    def _path(self, field: str, given: str) -> Path:
        if given.startswith(_OTHER_PLACES):
            raise InvalidExample(
                f"{given[:80]!r} is elsewhere; media are files below the folder of the data: "
                "fetch it first",
                param=field,
            )
        try:
            path = (self.folder / given).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidExample(
                f"{given[:80]!r} is no path of a file ({error}): correct it", param=field
            ) from error
        if not self.allow_absolute and not path.is_relative_to(self.folder):
            raise InvalidExample(
                f"{given[:80]!r} is outside the folder of the data; media are below it: move them "
                "there, or allow other places with --allow-absolute if you trust the data",
                param=field,
            )
        return path


def open_table(path: Path, *, allow_absolute: bool = False) -> OwnTable:
    """The table of a file or folder, or of FOLDER/SPLIT. Raises DataError for what is none."""
    shards = split_files(path)
    records: Records
    if shards:
        records, folder = ParquetRecords(shards), path.parent
    elif path.is_dir():
        records, folder = open_folder(path), path
    elif not path.is_file():
        raise DataError(
            f"there is no file or folder {str(path)!r}: give a JSONL or Parquet file, or a folder "
            "of Parquet or of Hugging Face's datasets"
        )
    elif path.suffix == ".parquet":
        records, folder = ParquetRecords([path]), path.parent
    elif path.suffix in _JSON_SUFFIXES:
        records, folder = JsonlRecords(path), path.parent
    else:
        raise DataError(
            f"{path.name} has an ending that is not known; allowed are "
            f"{', '.join((*_JSON_SUFFIXES, '.parquet'))}: name it by what it holds"
        )
    if not len(records):
        raise DataError(f"{path} has no rows: write at least one")
    return OwnTable(
        name=path.stem, records=records, folder=folder.resolve(), allow_absolute=allow_absolute
    )


def open_tables(paths: list[Path], *, allow_absolute: bool = False) -> list[OwnTable]:
    """The tables of several paths, with names of their own. Raises DataError."""
    tables = [open_table(path, allow_absolute=allow_absolute) for path in paths]
    names = [table.name for table in tables]
    if len(set(names)) == len(names):
        return tables
    longer = ["/".join(path.resolve().with_suffix("").parts[-2:]) for path in paths]
    if len(set(longer)) < len(longer):
        longer = [str(path) for path in paths]
    if len(set(longer)) < len(longer):
        raise DataError(f"a file is given twice: {', '.join(longer)}")
    return [replace(table, name=name) for name, table in zip(longer, tables, strict=True)]
