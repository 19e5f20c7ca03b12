"""A training of adapters by one process, and by ranks that share the weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from molmo_training.checkpoints.adapters import load_adapters, save_adapters, trained_state
from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.lora import LoraConfig, add_adapters

CONFIG = LoraConfig(rank=2, targets=("model.transformer.blocks.*",))
IDS = torch.arange(1, 41)[None]


def adapted(start: Path) -> nn.Module:
    model = load_model(open_checkpoint(start))
    add_adapters(model, CONFIG)
    return model


def sharded(start: Path) -> nn.Module:
    model = adapted(start)
    for block in model.model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def train(model: nn.Module, n_steps: int) -> dict[str, Tensor]:
    """What is trained, after so many steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return trained_state(model)


def trained_alone(start: Path, n_steps: int) -> dict[str, Tensor]:
    return train(adapted(start), n_steps)


def trained_in_ranks(folder: Path) -> list[dict[str, Tensor]]:
    """Train two steps, save as adapters and distributed, and take a third from either."""
    start, adapters, distributed = (folder / n for n in ("start", "adapters", "distributed"))
    model = sharded(start)
    state = train(model, 2)
    if dist.get_rank() == 0:
        save_adapters(state, adapters, CONFIG, start=start)
    save(get_model_state_dict(model), checkpoint_id=distributed)
    dist.barrier()
    of_adapters, of_distributed = sharded(start), sharded(start)
    load_adapters(of_adapters, adapters)
    whole = get_model_state_dict(of_distributed)
    load(whole, checkpoint_id=distributed)
    set_model_state_dict(of_distributed, whole)
    return [train(of_adapters, 1), train(of_distributed, 1)]
