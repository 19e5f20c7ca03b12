"""One rank of a sharded training of adapters, started by the tests as a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from molmo_training.checkpoints.adapters import load_adapters, save_adapters, trained_state
from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.lora import LoraConfig, add_adapters

CONFIG = LoraConfig(rank=2, targets=("model.transformer.blocks.*",))
IDS = torch.arange(1, 41)[None]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def trained_alone(start: Path, n_steps: int) -> dict[str, torch.Tensor]:
    model = load_model(open_checkpoint(start))
    add_adapters(model, CONFIG)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(n_steps):
        step(model, optimizer)
    return trained_state(model)


def sharded(start: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = load_model(open_checkpoint(start))
    add_adapters(model, CONFIG)
    for block in model.model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def run_rank(rank: int, n_ranks: int, folder: Path) -> None:
    """Train two steps, save (as adapters and distributed), load into another model, one more."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=n_ranks)
    model, optimizer = sharded(folder / "start")
    for _ in range(2):
        step(model, optimizer)
    state = trained_state(model)
    if rank == 0:
        save_adapters(state, folder / "adapters", CONFIG, start=folder / "start")
    save(get_model_state_dict(model), checkpoint_id=folder / "distributed")
    dist.barrier()
    for form in ("adapters", "distributed"):
        other, optimizer = sharded(folder / "start")
        if form == "adapters":
            load_adapters(other, folder / "adapters")
        else:
            whole = get_model_state_dict(other)
            load(whole, checkpoint_id=folder / "distributed")
            set_model_state_dict(other, whole)
        step(other, optimizer)
        state = trained_state(other)
        if rank == 0:
            torch.save(state, folder / f"{form}.pt")
    dist.destroy_process_group()
