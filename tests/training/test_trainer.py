"""The loop: it learns, it can be cut and go on, a bad loss stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from molmo_core.errors import TrainingError
from molmo_training.data.tokenize import Tokenizing
from molmo_training.trainer import Trainer
from tests.support.tiny_runs import picture_batches, tiny_trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_a_run_that_was_cut_ends_with_the_same_weights(
    tmp_path: Path, tokenizing: Tokenizing
) -> None:
    n, cut = 6, 3
    batches = picture_batches(tokenizing, range(n))
    whole = tiny_trainer(tmp_path / "whole", n_steps=n)
    whole.run(batches)

    first = tiny_trainer(tmp_path / "cut", n_steps=n)
    first.run(batches[:cut])
    second = tiny_trainer(tmp_path / "cut", n_steps=n)
    assert second.resume()
    assert second.at.step == cut
    second.run(batches[cut:])

    assert (whole.at.step, whole.at.examples) == (second.at.step, second.at.examples) == (n, 2 * n)
    after = weights(second)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, after[name]), name


def test_it_learns_what_it_is_shown_again_and_again(tmp_path: Path, tokenizing: Tokenizing) -> None:
    batches = picture_batches(tokenizing, [2])
    trainer = tiny_trainer(tmp_path)
    losses = [trainer.advance(batches)["loss"] for _ in range(35)]
    assert losses[0] > 5.5  # about log(526): nothing is known
    assert losses[-1] < 0.75 * losses[0]


def test_the_log_has_a_line_every_few_steps(tmp_path: Path, tokenizing: Tokenizing) -> None:
    trainer = tiny_trainer(tmp_path, n_steps=20)
    trainer.run(picture_batches(tokenizing, [2]) * 30)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20]
    assert {"loss", "probe_loss", "accuracy", "examples", "seconds"} <= set(lines[0])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, tokenizing: Tokenizing) -> None:
    trainer = tiny_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower the rates"):
        trainer.advance(picture_batches(tokenizing, [2]))
