"""Starts processes: one, or some that talk over gloo, of which the first one's result is given.

They are forked from one that has imported what they need and done nothing else: an import of torch
in each would take longer than the tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

_PRELOADED = [
    "torch.distributed.fsdp",
    "transformers",
    "molmo_hf.modeling_molmo2",
    "molmo_training.runs.run_state",
]
multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)


def process(work: Callable[..., None], *arguments: Any) -> Any:
    """A process that calls `work`, started."""
    child = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    child.start()
    return child


def run_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in each of `n_ranks` processes that know each other.

    Raises what one of them raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _run, (n_ranks, folder, function, arguments), nprocs=n_ranks, start_method="forkserver"
        )
        return torch.load(Path(folder) / "returned", weights_only=False)


def gathered(value: Any) -> list[Any]:
    """What each rank has, by rank, on each of them."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _run(
    rank: int, n_ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks
    )
    try:
        returned = function(*arguments)
        if rank == 0:
            torch.save(returned, Path(folder) / "returned")
        dist.barrier()
    finally:
        dist.destroy_process_group()
