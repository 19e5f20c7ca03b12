"""The loop: it learns, it can be cut and go on, a bad loss stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from molmo_core.checkpoints import FolderStore
from molmo_core.errors import TrainingError
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.data.loader import GROUP_SIZE, BatchStream, Source
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.recipes.tiny import TinyRecipe, build_trainer, write_settings
from molmo_training.trainer import Trainer

SOURCES = [Source(name="image", make=image_example, rate=1.0, batch_size=2)]


def trainer_in(folder: Path, max_steps: int) -> Trainer:
    trainer, _ = build_trainer(TinyRecipe(folder=folder, max_steps=max_steps, n_threads=1))
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_a_run_that_was_cut_ends_with_the_same_weights(
    tmp_path: Path, tokenizing: Tokenizing
) -> None:
    n = 2 * GROUP_SIZE
    batches = [b for b, _ in zip(BatchStream(SOURCES, tokenizing, seed=1), range(n), strict=False)]
    whole = trainer_in(tmp_path / "whole", n)
    whole.run(batches)

    first = trainer_in(tmp_path / "cut", n)
    first.run(batches[:GROUP_SIZE])
    second = trainer_in(tmp_path / "cut", n)
    assert second.resume()
    assert second.at.step == GROUP_SIZE
    second.run(BatchStream(SOURCES, tokenizing, seed=1, first_batch=second.at.step))

    assert (whole.at.step, whole.at.examples) == (second.at.step, second.at.examples) == (n, 2 * n)
    after = weights(second)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, after[name]), name


def test_it_learns_what_it_is_shown_again_and_again(tmp_path: Path, tokenizing: Tokenizing) -> None:
    batch = BatchStream(SOURCES, tokenizing, seed=2).group(0)[0]
    trainer = trainer_in(tmp_path, 40)
    losses = [trainer.advance([batch])["loss"] for _ in range(35)]
    assert losses[0] > 5.5  # about log(526): nothing is known
    assert losses[-1] < 0.75 * losses[0]


def test_the_log_has_a_line_every_few_steps(tmp_path: Path, tokenizing: Tokenizing) -> None:
    batch = BatchStream(SOURCES, tokenizing, seed=2).group(0)[0]
    trainer = trainer_in(tmp_path, 20)
    trainer.run([batch] * 30)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20]
    assert {"loss", "probe_loss", "accuracy", "examples", "seconds"} <= set(lines[0])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, tokenizing: Tokenizing) -> None:
    batch = BatchStream(SOURCES, tokenizing, seed=2).group(0)[0]
    trainer = trainer_in(tmp_path, 5)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower the rates"):
        trainer.advance([batch])


def test_every_saved_state_is_published_and_a_store_that_is_away_ends_nothing(
    tmp_path: Path, tokenizing: Tokenizing, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = TinyRecipe(
        folder=tmp_path / "run", max_steps=2, n_threads=1, publish_to=str(tmp_path / "store")
    )
    write_settings(recipe.folder)
    trainer, _ = build_trainer(recipe)
    trainer.run(BatchStream(SOURCES, tokenizing, seed=1))
    store = FolderStore(tmp_path / "store")
    (published,) = store.ids()  # the save on the way and the one at the end are of one step
    manifest = store.verify(published)
    assert (manifest.step, manifest.name, store.current()) == (2, "molmo2-tiny", published)
    opened = open_checkpoint(store.folder_of(published))
    name = "model.transformer.ln_f.weight"
    assert torch.equal(opened.weights.read(name), trainer.model.state_dict()[name].bfloat16())

    (tmp_path / "store" / "CURRENT").unlink()
    (tmp_path / "store" / "staging").rmdir()
    (tmp_path / "store" / "staging").write_text("in the way")
    trainer.at.step += 1
    trainer.save()
    assert "step is not published" in caplog.text
    assert store.current() is None
