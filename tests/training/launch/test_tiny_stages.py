"""molmo2-tiny from nothing: each stage goes on from the one before, at a size of seconds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.commands import configured
from molmo_training.launch.plan import Plan
from molmo_training.launch.running import train
from molmo_training.recipes import tiny
from molmo_training.recipes.tower import write_start

STAGES = ("tiny-one", "tiny-few", "tiny", "tiny-several")
SMALL = (
    "n_steps=1",
    "data.packs_per_batch=1",
    "data.packs_per_step=1",
    "data.buffer_size=4",
    "data.n_workers=0",
    "compute.n_threads=1",
    "saving.tensorboard=false",
)


def test_the_stages_follow_one_another_from_a_taught_tower(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    before = tmp_path / "tower"
    write_start(before, n_steps=1)
    embedding = "model.transformer.wte.embedding"
    for stage in STAGES:
        known = open_checkpoint(before).weights.read(embedding)
        plan = Plan(configured(stage, SMALL, init=before))
        trainer = train(plan, tmp_path / stage)
        assert trainer.at.step == 1
        assert trainer.lessons is not None
        before = tmp_path / stage
        run = open_checkpoint(before)
        assert run.differences() == []
        moved = (run.weights.read(embedding) - known).abs().max().item()
        assert 0 < moved < 1e-3  # nothing of it was pretrained, so it is learnt too
    assert (run.images, run.videos) == (tiny.IMAGES, tiny.VIDEOS)


def test_the_rates_of_the_stages_join() -> None:
    stages = [configured(stage, init=Path("tower")) for stage in STAGES]
    assert sum(stage.n_steps for stage in stages) == 4000
    for one, next_ in pairwise(stages):
        for group in ("llm", "connector", "vit"):
            end = one.optim.of(group).lr * one.optim.final_fraction
            assert abs(end - next_.optim.of(group).lr) < 1e-9
