"""Lengths that were counted once: kept as long as they are true, and never needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from molmo_core.errors import DataError
from molmo_training.datasets import open_dataset
from molmo_training.datasets.files import ParquetRecords

from . import layouts
from .test_public_sets import CASES

WRITE = {case.name: case.write for case in CASES}
DOCUMENTS = "torch_datasets/docqa/train_v1.0_withQT.json"
LENGTHS = ".cache/molmo/lengths"


def spoil(path: Path) -> None:
    """Other bytes, as many and as old."""
    found = path.stat()
    path.write_bytes(b"?" * found.st_size)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("doc_qa", DOCUMENTS),
        ("nextqa_mc", "video_datasets/NeXTQA/train.csv"),
        ("tulu4", "hub/allenai/molmo2-tulu4-classified/data/train-00000-of-00001.parquet"),
        (
            "pixmo_points_train",
            "torch_datasets/pixmo_datasets/points-pointing/train/data-00000-of-00001.arrow",
        ),
        (
            "llava_video_mc_academic",
            "video_datasets/LLaVA-Video-178K/0_30_s_academic_v0_1/"
            "0_30_s_academic_mc_v0_1_qa_processed.json",
        ),
    ],
)
def test_the_next_start_reads_no_table_for_its_length(tmp_path: Path, name: str, file: str) -> None:
    WRITE[name](tmp_path)
    n_rows = len(open_dataset(name, tmp_path))
    spoil(tmp_path / file)
    table = open_dataset(name, tmp_path)
    assert len(table) == n_rows > 0
    with pytest.raises(DataError):
        table.row(0)


def test_what_files_tell_themselves_is_not_kept(tmp_path: Path, home: Path) -> None:
    WRITE["cosyn_point"](tmp_path)
    WRITE["pixmo_cap_with_transcripts"](tmp_path)
    assert [len(open_dataset(name, tmp_path)) for name in ("cosyn_point", "pixmo_cap")] == [1, 1]
    assert not (home / LENGTHS).exists()


def test_files_that_changed_are_counted_again(tmp_path: Path, home: Path) -> None:
    WRITE["doc_qa"](tmp_path)
    assert len(open_dataset("doc_qa", tmp_path)) == 1
    asked = {"image": "documents/a.png", "question": "Who?", "answers": ["Ann"]}
    layouts.written_json(tmp_path / DOCUMENTS, {"data": [asked] * 3})
    assert len(open_dataset("doc_qa", tmp_path)) == 3
    os.utime(tmp_path / DOCUMENTS, ns=(0, 0))
    assert len(open_dataset("doc_qa", tmp_path)) == 3
    assert len(list((home / LENGTHS).iterdir())) == 3


def test_videos_that_came_later_are_counted(tmp_path: Path) -> None:
    WRITE["vixmo_points_minmax_0_5"](tmp_path)
    n_clips = len(open_dataset("vixmo_points_minmax_0_5", tmp_path))
    (copy,) = (tmp_path / "video_datasets").glob("*/*-2fps/*.mp4")
    copy.unlink()
    assert n_clips > 0
    assert len(open_dataset("vixmo_points_minmax_0_5", tmp_path)) == 0


def test_what_is_read_of_a_file_counts(tmp_path: Path) -> None:
    WRITE["tulu4"](tmp_path)
    row = ParquetRecords(
        list((tmp_path / "hub/allenai/molmo2-tulu4-classified").rglob("*.parquet"))
    ).record(4)
    long = {**row, "first_message_qwen3_tokens": 3000}
    layouts.hub(tmp_path, "allenai/molmo2-tulu4-classified", [row, long])
    assert len(open_dataset("tulu4", tmp_path)) == 2
    assert len(open_dataset("tulu4_max_2304", tmp_path)) == 1


def test_a_home_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "no folder"))
    WRITE["doc_qa"](tmp_path)
    for _ in range(2):
        table = open_dataset("doc_qa", tmp_path)
        assert (len(table), table.row(0)["question"]) == (1, "Who?")


def test_ranks_that_start_at_once_keep_one_length(tmp_path: Path, home: Path) -> None:
    WRITE["doc_qa"](tmp_path)
    tables = [open_dataset("doc_qa", tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as ranks:
        assert set(ranks.map(len, tables)) == {1}
    (kept,) = (home / LENGTHS).iterdir()
    assert kept.read_text() == "1\n"
    kept.write_text("")  # as a machine leaves it that lost power
    assert len(open_dataset("doc_qa", tmp_path)) == 1
    assert kept.read_text() == "1\n"


def test_a_wrong_length_ends_a_run_once(tmp_path: Path, home: Path) -> None:
    WRITE["doc_qa"](tmp_path)
    assert len(open_dataset("doc_qa", tmp_path)) == 1
    (kept,) = (home / LENGTHS).iterdir()
    kept.write_text("5\n")
    table = open_dataset("doc_qa", tmp_path)
    assert len(table) == 5
    for _ in range(2):
        with pytest.raises(DataError, match=r"has 1 rows, 5 were counted: .* begin anew"):
            table.row(0)
    assert len(open_dataset("doc_qa", tmp_path)) == 1
