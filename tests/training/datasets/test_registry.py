"""The registry: names, what is missing and what to do, nothing read before it is asked."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from molmo_core.errors import DataError
from molmo_training.data.own.commands import app
from molmo_training.datasets import (
    Dataset,
    all_datasets,
    data_folder,
    find_dataset,
    open_dataset,
    status_of,
)
from molmo_training.datasets.commands import list_command
from molmo_training.datasets.registry import dataset

from . import layouts
from .test_public_sets import CASES

LAYOUT = {case.name: case.write for case in CASES}


def test_names_that_are_none_have_near_ones() -> None:
    with pytest.raises(DataError, match="near are pixmo_points_train"):
        find_dataset("pixmo_point_train")
    with pytest.raises(DataError, match="`molmo data list` names all"):
        find_dataset("zzzz")
    with pytest.raises(DataError, match="no split val; it has train, validation"):
        open_dataset("drawn_points", Path("nowhere"), "val")
    taken = find_dataset("drawn_points")
    register = dataset(name=taken.name, groups=(), source="", splits=(), licence="")
    with pytest.raises(ValueError, match="have the name drawn_points"):
        register(taken.open)


PUBLIC = [found for found in all_datasets() if "drawn" not in found.groups]


@pytest.mark.parametrize("found", PUBLIC, ids=lambda found: found.name)
def test_a_missing_set_says_what_to_put_where(tmp_path: Path, found: Dataset) -> None:
    for split in found.splits:
        with pytest.raises(DataError) as caught:
            open_dataset(found.name, tmp_path, split)
        message = caught.value.message
        assert f"the dataset {found.name} ({split}) is not complete: {tmp_path}" in message
        assert "{root}" not in message
        assert message.count(str(tmp_path)) >= 2, "what is missing, and where to put it"


def test_opening_reads_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in LAYOUT.values():
        write(tmp_path)
    opened: list[str] = []
    real_open = open

    def watched(path: object, *rest: object, **named: object) -> object:
        opened.append(str(path))
        return real_open(path, *rest, **named)

    monkeypatch.setattr("io.open", watched)
    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", watched)
    tables = {name: open_dataset(name, tmp_path) for name in LAYOUT}
    assert [path for path in opened if str(tmp_path) in path] == []
    # A table is read when its length is asked, and then only it.
    assert len(tables["doc_qa"]) == 1
    assert {Path(path).name for path in opened if str(tmp_path) in path} == {
        "train_v1.0_withQT.json"
    }


def test_another_process_reads_only_tables_whose_rows_it_needs(tmp_path: Path) -> None:
    LAYOUT["doc_qa"](tmp_path)
    table = open_dataset("doc_qa", tmp_path)
    assert len(table) == 1
    there = pickle.loads(pickle.dumps(table))
    (tmp_path / "torch_datasets" / "docqa" / "train_v1.0_withQT.json").unlink()
    assert len(there) == 1
    with pytest.raises(DataError, match="cannot be read"):
        there.row(0)


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    LAYOUT["nextqa_mc"](tmp_path)
    train, val = status_of(find_dataset("nextqa_mc"), tmp_path)
    assert (train.is_present, train.n_rows) == (True, 1)
    assert (val.is_present, val.n_rows) == (False, None)
    assert "val.csv is missing" in val.reason


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOLMO_DATA_DIR", str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder(Path("given")) == Path("given")
    monkeypatch.delenv("MOLMO_DATA_DIR")
    assert data_folder() == Path("data")


def test_the_list(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    LAYOUT["tulu4"](tmp_path)
    list_command(root=tmp_path)
    text = capsys.readouterr().out
    assert "drawn_points" in text
    assert "train: 200,000 rows" in text
    assert f"hf download allenai/CoSyn-point --repo-type dataset --local-dir {tmp_path}/hub" in text
    list_command("nlp", root=tmp_path, json=True)
    facts = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in facts["datasets"]] == ["drawn_text", "tulu4"]
    assert facts["datasets"][1]["splits"][0]["n_rows"] == 1
    list_command("nlp", root=tmp_path, json=True, count=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["datasets"][1]["splits"][0] == {
        "split": "train",
        "is_present": True,
        "reason": "",
        "n_rows": None,
    }
    with pytest.raises(DataError, match="no group images; groups are"):
        list_command("images", root=tmp_path)
    app(["list", "drawn", "--root", str(tmp_path)], result_action="return_value")
    assert "drawn_tracks" in capsys.readouterr().out


def test_repositories_in_the_cache_of_hugging_face_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hf" / "datasets--HuggingFaceM4--ChartQA"
    for commit, n_rows in (("a" * 40, 1), ("b" * 40, 3)):
        image = {"bytes": layouts.picture_bytes(), "path": None}
        row = {"image": image, "query": "?", "label": ["1"], "human_or_machine": 1}
        place = cache / "snapshots" / commit / "data" / "train-00000-of-00001.parquet"
        layouts.parquet(place, [row] * n_rows)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    assert len(open_dataset("chart_qa", tmp_path / "data")) == 1, "the current one"
