"""JSONL as people write it: encodings, endings, broken lines, and paths that lead elsewhere."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import DataError, InvalidExample
from molmo_training.data.own import jsonl
from molmo_training.data.own.jsonl import JsonlRecords
from molmo_training.data.own.table import OwnTable, open_table, open_tables

ROW = {"image": "a.png", "label": "cat", "points": []}


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table_of(folder: Path, *rows: Any, allow_absolute: bool = False) -> OwnTable:
    path = written(folder / "rows.jsonl", "\n".join(json.dumps(row) for row in rows))
    return open_table(path, allow_absolute=allow_absolute)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b'{"a":1}\n{"a":2}\n', [1, 2]),
        (b'\xef\xbb\xbf{"a":1}\r\n{"a":2}\r\n', [1, 2]),
        (b'\n\r\n  \n{"a":1}\n\n\t{"a":2}   ', [4, 6]),
        (b'{"a":1}' + b" " * 100 + b"\n" + b" " * 20 + b'\n{"a":2}', [1, 3]),
    ],
)
def test_lines_are_found_and_told(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    records = JsonlRecords(written(tmp_path / "a.jsonl", content))
    assert [records.record(k)["a"] for k in range(len(records))] == [1, 2]
    assert [records.where(k) for k in range(2)] == [f"a.jsonl:{line}" for line in lines]


def test_an_escaped_pair_is_one_character(tmp_path: Path) -> None:
    records = JsonlRecords(written(tmp_path / "a.jsonl", rb'{"a": "\ud83d\ude00"}'))
    assert records.record(0) == {"a": "\N{GRINNING FACE}"}


def test_lines_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 7)
    content = "\n".join(json.dumps({"n": n, "text": "x" * n}) for n in range(60))
    records = JsonlRecords(written(tmp_path / "a.jsonl", content))
    assert [records.record(k)["n"] for k in range(60)] == list(range(60))
    assert pickle.loads(pickle.dumps(records)).record(59)["n"] == 59


def test_a_column_is_told(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"image": "a.png", "lable": "cat"})
    with pytest.raises(InvalidExample, match=r"^rows\.jsonl:1:20: unknown field 'lable'"):
        table.row(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": }', "a.jsonl:1:7: the line is no JSON"),
        (b'{"a": "\xff"}', "a.jsonl:1:8: the line is not UTF-8 (byte 0xff)"),
        (rb'{"a": "\ud83d"}', "a.jsonl:1: an escape \\ud8… of a text is half a character"),
        (b'{"a": ' * 60_000, "a.jsonl:1: the line cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:1: the line cannot be read"),
    ],
)
def test_a_broken_line_is_told(tmp_path: Path, line: bytes, message: str) -> None:
    records = JsonlRecords(written(tmp_path / "a.jsonl", line))
    with pytest.raises(InvalidExample) as caught:
        records.record(0)
    assert caught.value.message.startswith(message)


def test_a_huge_line_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    content = json.dumps({"text": "x" * 1000}) + '\n{"a": 1}\n'
    records = JsonlRecords(written(tmp_path / "a.jsonl", content))
    with pytest.raises(InvalidExample, match=r"a\.jsonl:1: a line of 1,012 bytes, at most 1,000"):
        records.record(0)
    assert records.record(1) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl", '{"a":1}'.encode("utf-16"), "is UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "gunzip"),
        ("a.jsonl", b"PAR1", "ends with .parquet"),
        ("a.json", b' [{"a": 1}]', "is a list in JSON"),
        ("a.csv", b"a,b", "ending that is not known"),
    ],
)
def test_files_of_another_kind_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        open_table(written(tmp_path / name, content))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        open_table(tmp_path / "a.jsonl")


def test_a_file_that_grows_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n')
    records = JsonlRecords(path)
    written(path, '{"a": 1, "b": 2}\n')
    with pytest.raises(DataError, match="has changed since it was opened"):
        records.record(0)


def test_paths_are_below_the_folder_of_the_data(tmp_path: Path) -> None:
    rows = [{**ROW, "image": "sub/ü \"'<b>.png"}, {"images": ["a", "./b/../c"], "text": "x"}]
    table = table_of(tmp_path, *rows)
    assert table.row(0)["image"] == tmp_path / "sub/ü \"'<b>.png"
    assert table.row(1)["images"] == [tmp_path / "a", tmp_path / "c"]


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "b/../../a.png", "link/a.png"])
def test_paths_that_lead_elsewhere_need_leave(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidExample, match=r"rows\.jsonl:1:2: .* is outside the folder"):
        table_of(folder, {**ROW, "image": path}).row(0)
    allowed = table_of(folder, {**ROW, "image": path}, allow_absolute=True)
    assert allowed.row(0)["image"] == (folder / path).resolve()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://a/b.png", "is elsewhere"),
        ("data:image/png;base64,AA", "is elsewhere"),
        ("a\0.png", "is no path of a file"),
        ("", "holds no path and no bytes"),
        ({"bytes": None, "path": None}, "holds no path and no bytes"),
        ({"bytes": b"".hex()}, "holds no path and no bytes"),
    ],
)
def test_what_is_no_path_is_refused(tmp_path: Path, path: Any, message: str) -> None:
    with pytest.raises(InvalidExample, match=message):
        table_of(tmp_path, {**ROW, "image": path}).row(0)
    with pytest.raises(InvalidExample, match=message):
        table_of(tmp_path, {"images": ["a", path], "text": "x"}).row(0)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "train.jsonl", json.dumps(ROW))
    paths = [tmp_path / "a/train.jsonl", tmp_path / "b/train.jsonl"]
    assert [table.name for table in open_tables(paths)] == ["a/train", "b/train"]
    with pytest.raises(DataError, match="given twice"):
        open_tables([paths[0], paths[0]])
