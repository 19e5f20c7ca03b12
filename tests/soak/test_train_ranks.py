"""A run of several ranks is the run of one: the same packs, losses and, when it goes on, states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from molmo_training.commands import configured
from molmo_training.launch.plan import Plan
from molmo_training.launch.running import train
from molmo_training.parallel.mesh import ParallelConfig
from molmo_training.train_config import TrainConfig
from tests.support.ranks import run_ranks
from tests.training.launch.test_train_command import SMALL

pytestmark = pytest.mark.soak

EXACT = (
    *SMALL,
    "n_steps=2",
    "save_every=1",
    "compute.autocast_bf16=false",
    "model.object_lessons=false",
    "model.response_dropout=0",
)


def exact() -> TrainConfig:
    return configured("pretrain-debug", EXACT)


def run_in(folder: Path, parallel: ParallelConfig) -> int:
    train(Plan(replace(exact(), parallel=parallel)), folder)
    return dist.get_world_size()


def logged(folder: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "accuracy", "tokens", "grad_norm/total", "val/loss")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k in kept} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("alone")
    train(Plan(exact()), folder)
    return logged(folder)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(shard="fsdp"),
        ParallelConfig(context_degree=2, shard="fsdp"),
        ParallelConfig(context_degree=2, context_kind="ring"),
    ],
    ids=["each its packs", "weights split", "packs and weights split", "ring"],
)
def test_two_ranks_learn_the_same_and_one_goes_on(
    alone: list[dict[str, float]], tmp_path: Path, parallel: ParallelConfig
) -> None:
    assert run_ranks(2, run_in, tmp_path, parallel) == 2
    assert_near(logged(tmp_path), alone)
    (tmp_path / "step2" / "complete.json").unlink()
    assert train(Plan(exact()), tmp_path).at.step == 2  # what is cut is not taken for whole
    assert_near(logged(tmp_path), alone)


def assert_near(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
