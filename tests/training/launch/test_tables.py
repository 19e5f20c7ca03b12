"""What a run reads: each file opened once, all that is missing told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import DataError
from molmo_training.data.mixture import Group, Part
from molmo_training.data.own import jsonl
from molmo_training.data.packing import Budgets
from molmo_training.launch.tables import tables_of
from molmo_training.train_config import DataConfig, HeldOutConfig

ROW = '{"question": "a", "answer": "b"}\n'
TEXT = HeldOutConfig(name="text", dataset="drawn_text")


def data_of(*names: str, folder: Path, **settings: Any) -> DataConfig:
    """The named datasets in a group of their own, and drawn points beside it."""
    inner = Group(name="inner", parts=tuple(Part(dataset=name) for name in names))
    mixture = Group(name="all", parts=(inner, Part(dataset="drawn_points")))
    budgets = Budgets(n_tokens=512, n_crops=8)
    return DataConfig(mixture=mixture, budgets=budgets, folder=folder, **settings)


def test_a_file_is_opened_once_for_all_that_is_read_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tuple(tmp_path / f"{name}.jsonl" for name in ("learnt", "seen"))
    for n_rows, file in enumerate(files, 1):
        file.write_text(ROW * n_rows)
    held_out = [HeldOutConfig(name=f"val{k}", dataset="seen", split=str(k)) for k in range(2)]
    opened, index = [], jsonl._index
    monkeypatch.setattr(jsonl, "_index", lambda path: opened.append(path) or index(path))
    data = data_of("learnt", "drawn_text", folder=tmp_path, files=files)
    mixture, tables = tables_of(replace(data, held_out=(*held_out, TEXT)))
    assert opened == list(files)
    assert mixture == data.mixture
    sizes = {key: len(table) for key, table in tables.items() if not key[0].startswith("drawn")}
    assert sizes == {("learnt", "train"): 1, ("seen", "0"): 2, ("seen", "1"): 2}
    assert len(tables["drawn_text", "train"]) != len(tables["drawn_text", "validation"])


def test_all_that_is_missing_is_told_at_once_wrong_names_first(tmp_path: Path) -> None:
    held_out = (TEXT, HeldOutConfig(name="val", dataset="pixmo_cap"))
    data = data_of("pixmo_cap", "drawn_txt", "drawn_text", folder=tmp_path, held_out=held_out)
    with pytest.raises(DataError) as caught:
        tables_of(data)
    said = caught.value.message
    assert said.startswith("3 datasets are missing; those of the mixture are left out with data.")
    assert "(1) there is no dataset drawn_txt; near are drawn_text" in said
    assert "(2) the dataset pixmo_cap (train) is not complete: " in said
    assert "(3) the dataset pixmo_cap (validation) is not complete: " in said
    assert said.count("Source: ") == 2


def test_what_is_left_out_is_told_by_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of("pixmo_cap", "drawn_txt", folder=tmp_path, leave_out_missing=True)
    mixture, tables = tables_of(replace(data, held_out=(TEXT,)))
    assert mixture == Group(name="all", parts=(Part(dataset="drawn_points"),))
    assert set(tables) == {("drawn_points", "train"), ("drawn_text", "validation")}
    files, names = caplog.messages
    assert files == "left out, for their files are not there: pixmo_cap"
    assert names.startswith("left out, for their names are wrong: there is no dataset drawn_txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mixture": Group(name="all", parts=(Part(dataset="drawn_txt"),))},
            "^there is no dataset drawn_txt; near are drawn_text",
        ),
        (
            {"held_out": (replace(TEXT, dataset="drawn_txt"),)},
            "^there is no dataset drawn_txt; near are drawn_text",
        ),
        (
            {"held_out": (replace(TEXT, split="val"),)},
            "^the dataset drawn_text has no split val; it has train, validation",
        ),
    ],
    ids=["nothing of the mixture", "not a held-out set", "not a split of one"],
)
def test_what_cannot_be_left_out_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = data_of("pixmo_cap", folder=tmp_path, leave_out_missing=True)
    with pytest.raises(DataError, match=message):
        tables_of(replace(data, **change))
