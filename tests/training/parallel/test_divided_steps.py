"""A step that several ranks share is the step of one: loss, every gradient, weights after it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from molmo_training.parallel.mesh import ParallelConfig
from tests.support.ranks import run_ranks
from tests.training.parallel.shared_step import Step, Way, divided_step, divided_steps


def context(degree: int, kind: Any, **other: Any) -> ParallelConfig:
    return ParallelConfig(context_degree=degree, context_kind=kind, **other)


OF_FOUR = {
    "two ranks a batch, ulysses": Way(parallel=context(2, "ulysses")),
    "two ranks a batch, ring": Way(parallel=context(2, "ring"), computes_again=True),
    "ulysses": Way(parallel=context(4, "ulysses"), computes_again=True),
    "ulysses with a dense mask": Way(parallel=context(4, "ulysses"), attention="dense"),
    "ring": Way(parallel=context(4, "ring")),
    "causal, ulysses": Way(parallel=context(4, "ulysses"), bidirectional="none"),
    "causal, ring": Way(parallel=context(4, "ring"), bidirectional="none"),
    "fsdp": Way(parallel=ParallelConfig(shard="fsdp"), computes_again=True),
    "hsdp": Way(parallel=ParallelConfig(shard="fsdp", replicas=2)),
    "fsdp and ulysses": Way(parallel=context(2, "ulysses", shard="fsdp"), computes_again=True),
    "hsdp and ring": Way(parallel=context(2, "ring", shard="fsdp", replicas=2)),
}
OF_TWO = {
    "fsdp": Way(parallel=ParallelConfig(shard="fsdp")),
    "fsdp, a step of AdamW": Way(parallel=ParallelConfig(shard="fsdp"), with_adamw=True),
    "fsdp, head and embedding are one": Way(
        parallel=ParallelConfig(shard="fsdp"), with_adamw=True, is_tied=True
    ),
    "bfloat16": Way(parallel=context(2, "ulysses", shard="fsdp", gather_bf16=True), autocasts=True),
}


@pytest.fixture(scope="module")
def of_four() -> dict[str, Step]:
    return dict(zip(OF_FOUR, run_ranks(4, divided_steps, list(OF_FOUR.values())), strict=True))


@pytest.fixture(scope="module")
def of_two() -> dict[str, Step]:
    return dict(zip(OF_TWO, run_ranks(2, divided_steps, list(OF_TWO.values())), strict=True))


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_compute_what_one_does(name: str, of_four: dict[str, Step]) -> None:
    compare(of_four[name], OF_FOUR[name])


@pytest.mark.parametrize("name", [name for name in OF_TWO if name != "bfloat16"])
def test_two_ranks_compute_what_one_does(name: str, of_two: dict[str, Step]) -> None:
    compare(of_two[name], OF_TWO[name])


def test_weights_in_bfloat16_give_gradients_in_float32(of_two: dict[str, Step]) -> None:
    found, alone = of_two["bfloat16"], divided_step(Way())
    assert abs(found.loss / alone.loss - 1) < 0.02
    for name, gradient in found.values.items():
        assert gradient.dtype == torch.float32
        size, error = (float(t.norm()) for t in (alone.values[name], gradient - alone.values[name]))
        assert error < 0.3 * size or name.endswith("wk.bias"), name


def test_blocks_compute_what_a_dense_mask_does() -> None:
    compare(divided_step(Way()), Way())


alone_by_way = cache(divided_step)


def compare(found: Step, way: Way) -> None:
    """With one process and a mask of all pairs."""
    alone = alone_by_way(
        Way(
            attention="dense",
            bidirectional=way.bidirectional,
            with_adamw=way.with_adamw,
            is_tied=way.is_tied,
        )
    )
    assert abs(found.loss - alone.loss) < 1e-5
    assert found.values.keys() == alone.values.keys()
    for name, value in alone.values.items():
        # A bias of all keys moves every score alike: softmax does not see it.
        assert value.abs().max() > 1e-4 or name.endswith("wk.bias"), f"{name} is not trained"
        assert (found.values[name] - value).abs().max() < 1e-5, name
