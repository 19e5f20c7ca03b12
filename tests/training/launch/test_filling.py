"""A model whose weights are read by one rank has those of the checkpoint on all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from molmo_core.errors import CheckpointError
from molmo_training.checkpoints.opened import OpenedCheckpoint, load_model, open_checkpoint
from molmo_training.launch.plan import choose_trained
from molmo_training.launch.running import prepared_model
from molmo_training.lora import LoraConfig
from molmo_training.parallel.mesh import ParallelConfig, make_mesh
from molmo_training.train_config import ModelConfig
from tests.support.ranks import gathered, run_ranks

NATIVE = Path(__file__).parents[2] / "golden" / "native"
SMALL, TIED = NATIVE / "olmo3", NATIVE / "qwen3_tied-unsharded"
CPU = torch.device("cpu")
CASES = {
    "whole": (SMALL, ModelConfig(), ParallelConfig(shard="fsdp")),
    "adapters": (SMALL, ModelConfig(lora=LoraConfig(rank=3)), ParallelConfig(shard="fsdp")),
    "head and embedding are one": (TIED, ModelConfig(), ParallelConfig(shard="fsdp")),
    "two replicas": (SMALL, ModelConfig(), ParallelConfig(shard="fsdp", replicas=2)),
    "not split": (SMALL, ModelConfig(), ParallelConfig()),
}


class Counted:
    """Weights that know how often they were read."""

    def __init__(self, weights: Any, fails: bool = False) -> None:
        self._weights, self.n_read, self._fails = weights, 0, fails

    def shapes(self) -> Any:
        return self._weights.shapes()

    def read(self, name: str) -> torch.Tensor:
        self.n_read += 1
        if self._fails and self.n_read == 3:
            raise CheckpointError(f"{name} is cut short")
        found: torch.Tensor = self._weights.read(name)
        return found


def planned(opened: OpenedCheckpoint, weights: Counted, config: ModelConfig) -> Any:
    """As much of a plan as a model is made of."""
    start = SimpleNamespace(weights=weights)
    return SimpleNamespace(
        config=SimpleNamespace(model=config),
        start=SimpleNamespace(opened=start, config=opened.config, is_tied=opened.is_tied),
    )


def differing() -> dict[str, tuple[list[str], list[int]]]:
    """By case: parameters that differ from those of one process; tensors that each rank read."""
    found = {}
    for case, (folder, config, parallel) in CASES.items():
        opened = open_checkpoint(folder)
        weights = Counted(opened.weights)
        model, _ = prepared_model(planned(opened, weights, config), make_mesh(parallel), CPU)
        alone = load_model(opened)
        choose_trained(alone, config, is_tied=opened.is_tied)
        expected = dict(alone.named_parameters())
        named = dict(model.named_parameters())
        wrong = sorted(expected.keys() ^ named.keys())
        for name, parameter in named.items():
            assert isinstance(parameter, DTensor) is (parallel.shard == "fsdp")
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            is_alike = parameter.requires_grad is expected[name].requires_grad
            if not (torch.equal(whole, expected[name]) and is_alike):
                wrong.append(name)
        found[case] = wrong, gathered(weights.n_read)
    return found


def failures() -> list[str]:
    """What each rank hears of a checkpoint that cannot be read to its end."""
    opened = open_checkpoint(SMALL)
    weights = Counted(opened.weights, fails=dist.get_rank() == 0)
    mesh = make_mesh(ParallelConfig(shard="fsdp"))
    try:
        prepared_model(planned(opened, weights, ModelConfig()), mesh, CPU)
    except CheckpointError as error:
        return gathered(error.message)
    return []


def of_both() -> tuple[dict[str, tuple[list[str], list[int]]], list[str]]:
    return differing(), failures()


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, tuple[list[str], list[int]]], list[str]]:
    found: tuple[dict[str, tuple[list[str], list[int]]], list[str]] = run_ranks(2, of_both)
    return found


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_have_the_weights_that_one_of_them_reads(case: str, both: Any) -> None:
    wrong, (by_first, by_second) = both[0][case]
    assert wrong == []
    assert by_first > 20
    assert by_second == (by_first if case == "not split" else 0)


def test_all_ranks_hear_of_a_checkpoint_that_is_cut(both: Any) -> None:
    first, second = both[1]
    assert first == second
    assert first.endswith("is cut short")
