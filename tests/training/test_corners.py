"""The finetune of the hot-load demonstration: its questions, and that it starts from weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.recipes import corners
from tests.support.checkpoint import TINY


def test_every_kind_in_the_picture_is_asked_about_once() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        example = corners.corners_example(rng)
        asked = {branch.turns[0].text: branch.turns[1].text for branch in example.branches}
        assert len(asked) == len(example.branches) >= 1
        for question, answer in asked.items():
            shape = question.removesuffix("?").split()[-1]
            assert answer == str({"circle": 0, "triangle": 3, "square": 4, "star": 10}[shape])


def test_it_starts_from_the_packaged_weights_and_leaves_a_run_that_can_be_published(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    trainer = corners.train(tmp_path / "run", TINY, 2)
    assert trainer.at.step == 2
    run, base = open_checkpoint(tmp_path / "run"), open_checkpoint(TINY)
    assert run.step == 2
    assert run.differences() == []
    assert (run.images, run.videos) == (base.images, base.videos)
    assert run.config.to_dict() == base.config.to_dict()
    name = "model.transformer.blocks.0.mlp.ff_out.weight"
    moved = (run.weights.read(name) - base.weights.read(name).float()).abs().max().item()
    assert 0 < moved < 0.01
