"""States of a run as checkpoints: read tensor by tensor, shown, imported, published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from molmo_client.__main__ import main as molmo
from molmo_core import __version__
from molmo_core.checkpoints import FolderStore
from molmo_core.errors import CheckpointError
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.checkpoints.opened import Kind, open_checkpoint
from molmo_training.checkpoints.publish import publish
from molmo_training.recipes.tiny import build_model
from molmo_training.runs.log import append_figures
from molmo_training.runs.run_state import RunState
from tests.support.tiny_runs import write_tiny_settings

SHARES = {"drawn": 0.75, "written": 0.25}


@pytest.fixture(scope="module")
def model() -> Molmo2ForConditionalGeneration:
    return build_model(seed=5)


@pytest.fixture(scope="module")
def run(model: Molmo2ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_tiny_settings(folder)
    state = RunState(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    for step in (3, 12):
        if step == 12:
            with torch.no_grad():
                model.lm_head.weight -= 1
        append_figures(folder, {"step": step, "loss": 1 / step, "tokens_per_s": 5.0})
        state.save(
            step,
            model=model,
            optimizers=[torch.optim.AdamW(model.parameters())],
            beside=torch.nn.Linear(2, 2),
            data={},
            progress={"data_shares": SHARES},
            config={"optim": {"rate": 0.5, "betas": [0.9, 0.95]}, "name": "a|b"},
        )
        state.wait()
    state.close()
    append_figures(folder, {"step": 13, "loss": 99.0})  # after the last state
    return folder


def test_a_run_opens_as_its_last_step(run: Path, model: Molmo2ForConditionalGeneration) -> None:
    opened = open_checkpoint(run)
    assert (opened.kind, opened.step, opened.folder) == (Kind.RUN, 12, run / "step12")
    opened.check_complete()
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.weights.read(name), tensor), name
    earlier = open_checkpoint(run / "step3")
    assert earlier.step == 3
    name = "lm_head.weight"
    assert torch.equal(earlier.weights.read(name), (opened.weights.read(name) + 1))


def test_a_step_that_was_cut_is_passed_over_and_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        if path.name != "step12":
            (copy / path.name).symlink_to(path)
    (copy / "step12").mkdir()
    for path in (run / "step12").iterdir():
        if path.name != "data.json":
            (copy / "step12" / path.name).symlink_to(path)
    assert open_checkpoint(copy).step == 3
    with pytest.raises(CheckpointError, match=r"'step12' is no whole state: data.json is missing"):
        open_checkpoint(copy / "step12")


def test_commands_take_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert molmo(["checkpoint", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["folder"]) == ("run", "step12")
    out = tmp_path / "mine"
    options = ["--card", "--base-model", "somebody/model"]
    assert molmo(["checkpoint", "import", str(run), str(out), *options]) == 0
    assert molmo(["checkpoint", "verify", str(run), str(out)]) == 0
    assert (out / "README.md").read_text() == _CARD.replace("VERSION", __version__)


def test_a_card_is_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert molmo(["checkpoint", "import", str(run / "model"), out, "--card"]) != 0
    assert "'model' has no saved state; a card is written of a run" in capsys.readouterr().err
    assert molmo(["checkpoint", "import", str(run / "step3"), out, "--card"]) == 0
    assert "| loss | 0.333333 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_step_is_published(run: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = publish(run / "step3", store, name="mine")
    assert (manifest.step, manifest.source) == (3, run.name)
    assert store.current() == manifest.id
    assert store.verify(manifest.id) == manifest


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- molmo2
base_model: somebody/model
---
# mine

A Molmo2 trained from `somebody/model` for 12 steps with molmo-serve VERSION. \
Read by transformers with `trust_remote_code=True`.

## Data

| dataset | share |
|---|---|
| drawn | 75.00 % |
| written | 25.00 % |

## Figures

| figure | last value |
|---|---|
| loss | 0.0833333 |

## Settings

| setting | value |
|---|---|
| optim.rate | `0.5` |
| optim.betas | `[0.9, 0.95]` |
| name | `a\\|b` |
"""
