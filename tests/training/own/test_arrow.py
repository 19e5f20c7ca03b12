"""Parquet and the folders of Hugging Face's datasets, in the layouts that those libraries write."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo_core.errors import DataError, InvalidExample
from molmo_training.data.own import arrow
from molmo_training.data.own.table import open_table


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, "PNG")
    return file.getvalue()


def rows(n: int = 5) -> Any:
    return pa.table(
        {
            "image": [{"bytes": png(), "path": "a.png"}] * n,
            "label": [f"cat {k}" for k in range(n)],
            "points": [{"x": [1.0, 3.0], "y": [2.0, 4.0]}] * n,
            "alt": pa.nulls(n, pa.string()),
        }
    )


def save_to_disk(table: Any, folder: Path, n_files: int = 2) -> Path:
    """As `Dataset.save_to_disk` of datasets 5."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{n_files:05d}.arrow" for k in range(n_files)]
    for k, name in enumerate(names):
        part = table.slice(k * 3, 3)
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, part.schema) as out,
        ):
            out.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def check_rows(path: Path, n: int = 5) -> None:
    table = pickle.loads(pickle.dumps(open_table(path)))
    assert len(table) == n
    for k in (n - 1, 0, 2):
        row = table.row(k)
        assert row["image"] == png()
        assert row["label"] == f"cat {k}"
        assert row["points"] == [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]
        assert row["style"] == "pointing"
    with pytest.raises(IndexError):
        table.row(n)


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    pq.write_table(rows(11), tmp_path / "a.parquet", row_group_size=2)
    check_rows(tmp_path / "a.parquet", 11)


def test_row_groups_read_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(rows(10), tmp_path / "a.parquet", row_group_size=2)
    table, read = open_table(tmp_path / "a.parquet"), []
    of_file = arrow.ParquetRecords._read

    def noted(records: arrow.ParquetRecords, group: int) -> Any:
        read.append(group)
        return of_file(records, group)

    monkeypatch.setattr(arrow.ParquetRecords, "_read", noted)
    monkeypatch.setattr(arrow, "KEPT_BYTES", 2 * of_file(table.records, 0).nbytes)
    monkeypatch.setattr(arrow, "_KEPT", arrow._KeptTables())
    labels = [table.row(k)["label"] for k in (0, 2, 1, 4, 0, 3)]
    assert labels == [f"cat {k}" for k in (0, 2, 1, 4, 0, 3)]
    assert read == [0, 1, 2, 1]
    monkeypatch.setattr(arrow, "KEPT_BYTES", 1)
    assert [table.row(k)["label"] for k in (9, 8)] == ["cat 9", "cat 8"]
    assert read[4:] == [4]


def test_a_folder_of_parquet_is_one_table(tmp_path: Path) -> None:
    for k in range(2):
        part = rows(5).slice(k * 3, 3)
        pq.write_table(part, tmp_path / f"train-{k:05d}-of-00002.parquet")
    check_rows(tmp_path)
    assert open_table(tmp_path).where(4, "label") == "train-00001-of-00002.parquet:row 1:label"
    pq.write_table(rows(2), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"holds the splits test, train: give one, as .*/test"):
        open_table(tmp_path)
    check_rows(tmp_path / "train")


def test_a_saved_dataset(tmp_path: Path) -> None:
    check_rows(save_to_disk(rows(), tmp_path / "one"))
    save_to_disk(rows(), tmp_path / "all" / "train")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="holds the splits train"):
        open_table(tmp_path / "all")
    check_rows(tmp_path / "all" / "train")


def test_pictures_of_a_dataset_may_be_files(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": None, "path": "b.png"}], "text": ["A cat."]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_table(tmp_path / "a.parquet").row(0)["image"] == tmp_path / "b.png"


def test_an_error_names_file_row_and_field(tmp_path: Path) -> None:
    pq.write_table(pa.table({"lable": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidExample, match=r"^a\.parquet:row 0:lable: unknown field 'lable'"):
        open_table(tmp_path / "a.parquet").row(0)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(rows(), whole)
    content = whole.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="is no complete Parquet file"):
        open_table(tmp_path / "cut.parquet")
    (tmp_path / "bad.parquet").write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(InvalidExample, match=r"bad\.parquet: row group 0 cannot be read"):
        open_table(tmp_path / "bad.parquet").row(0)
    saved = save_to_disk(rows(), tmp_path / "saved", n_files=1)
    (saved / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="is no complete Arrow file"):
        open_table(saved)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../a.arrow"}]}')
    with pytest.raises(DataError, match="files lie beside it"):
        open_table(saved)
    (saved / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_table(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no dataset"):
        open_table(tmp_path / "empty")


def test_text_that_is_none_is_told(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    save_to_disk(pa.table({"label": broken}), tmp_path / "one", n_files=1)
    with pytest.raises(InvalidExample, match=r"^one:row 0: it cannot be read"):
        open_table(tmp_path / "one").row(0)
