"""The tower alone: its pictures, and that it learns."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from molmo_training.checkpoints.opened import Kind, open_checkpoint
from molmo_training.data.scenes import image_example
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.pixels import normalised
from molmo_training.recipes import tiny
from molmo_training.recipes.object_lessons import ObjectProbe
from molmo_training.recipes.tiny import IMAGES, build_model
from molmo_training.recipes.tower import PictureStream, TowerConfig, train_tower, write_start

make = partial(image_example, most_objects=2, n_branches=1)


def test_batches_follow_from_seed_and_number() -> None:
    stream = PictureStream(make, IMAGES, batch_size=2, seed=5)
    crops, targets = stream.batch(3)
    assert crops.shape == (2, 81, 588)
    assert targets.shape == (2, 81, 8)
    assert torch.equal(stream.batch(3)[0], crops)
    assert not torch.equal(stream.batch(4)[0], crops)
    assert targets[..., 0].sum(dim=1).min() >= 1


def test_it_learns_what_it_is_shown_again(tmp_path: Path) -> None:
    backbone = build_model(0).model.vision_backbone
    probe = ObjectProbe(384, 4, 6, place_columns=(3, 4))
    batch = PictureStream(make, IMAGES, batch_size=4, seed=5).batch(0)
    before = probe(backbone.encode(normalised(batch[0])), batch[1]).item()
    optim = OptimConfig(vit=GroupConfig(lr=3e-3, warmup_steps=5), muon=True)
    config = TowerConfig(folder=tmp_path, n_steps=60, optim=optim, log_every=30)
    train_tower(backbone, probe, [batch] * 60, config)
    assert probe(backbone.encode(normalised(batch[0])), batch[1]).item() < 0.5 * before
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["tower_step"] for line in lines] == [30, 60]
    assert lines[-1]["colour"] > 0.9


def test_a_checkpoint_to_start_from_is_written_once(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    start = tmp_path / "tower"
    write_start(start, n_steps=1)
    opened = open_checkpoint(start)
    opened.check_complete()
    assert (opened.kind, opened.images) == (Kind.HF, IMAGES)
    random = build_model(tiny.SEED).state_dict()
    moved = {
        name
        for name, tensor in random.items()
        if not torch.equal(opened.weights.read(name), tensor)
    }
    assert moved
    assert all("image_vit." in name for name in moved)

    written = (start / "model.safetensors").stat().st_mtime_ns
    write_start(start, n_steps=1)
    assert (start / "model.safetensors").stat().st_mtime_ns == written
