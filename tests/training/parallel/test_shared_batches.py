"""The ranks of a group get what the first of them reads: batches, their end, an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch

from molmo_core.errors import DataError
from molmo_training.data.example import Batch
from molmo_training.parallel.mesh import ALONE, ParallelConfig, make_mesh
from molmo_training.parallel.shared_batches import shared_batches
from tests.support.ranks import run_ranks
from tests.training.parallel.shared_step import batches


def failing() -> Iterator[Batch]:
    yield batches()[2]
    raise DataError("the disk is gone")


def read_by_pairs() -> list[tuple[list[int], str]]:
    """For each rank which batches it got, and the error that came after the first one."""
    mesh = make_mesh(ParallelConfig(context_degree=2))
    known = batches()
    is_first = mesh.cp_rank == 0
    mine = known[mesh.dp_rank :: mesh.dp_size] if is_first else None
    found = [
        next(number for number, batch in enumerate(known) if are_equal(batch, shared))
        for shared in shared_batches(mine, mesh)
    ]
    said = ""
    try:
        n_read = sum(1 for _ in shared_batches(failing() if is_first else None, mesh))
    except DataError as error:
        said = error.message
    else:
        raise AssertionError(f"no error after {n_read} batches")
    gathered: list[tuple[list[int], str]] = [([], "")] * 4
    torch.distributed.all_gather_object(gathered, (found, said))
    return gathered


def are_equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_one_rank_reads_for_its_group() -> None:
    found = run_ranks(4, read_by_pairs)
    assert found == [([0, 2], "the disk is gone")] * 2 + [([1, 3], "the disk is gone")] * 2


def test_alone_batches_are_what_is_read() -> None:
    read = batches()
    assert list(shared_batches(read, ALONE)) == read
