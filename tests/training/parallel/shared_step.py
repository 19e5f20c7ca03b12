"""Mixed batches, and the loss and gradients of a step however it is divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from molmo_core.prompts import Turn
from molmo_training import ranks
from molmo_training.compute import ComputeConfig, prepare_blocks
from molmo_training.data.example import Batch, Branch, Example, Tokenized
from molmo_training.data.loader import collate
from molmo_training.data.packing import pack_rows
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import AttentionKind, Forward
from molmo_training.loss import LossConfig, token_loss
from molmo_training.parallel.mesh import ParallelConfig, make_mesh
from molmo_training.parallel.sharding import shard_model, split_again
from molmo_training.recipes.tiny import CROP_PX, IMAGES, VIDEOS
from molmo_training.vocabulary import load_vocabulary
from tests.support.small_model import small_model


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is divided and attended."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionKind = "blocks"
    bidirectional: str = "all"
    with_adamw: bool = False
    """Give weights after a step of AdamW in the place of gradients; a batch is looked at without
    gradients before and after, as in validation."""
    is_tied: bool = False
    computes_again: bool = False
    """Blocks in the backward pass, as trainers do."""
    autocasts: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    loss: float
    values: dict[str, Tensor]
    """Gradients, or weights, by name."""


def batches() -> list[Batch]:
    """Four batches: packed trees about pictures and a video in rows of two lengths; one picture,
    which only one of several ranks can encode; text alone; several pictures."""
    tokenizing = Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)
    rng = np.random.default_rng(5)
    several = [tokenizing(multi_image_example(rng, n_branches=2)) for _ in range(2)]
    pictures = [tokenizing(image_example(rng)) for _ in range(3)]
    video = tokenizing(video_example(rng, VIDEOS))
    text = _text_row(tokenizing)
    packs = [[pictures[0], video, text, several[0]], [pictures[1]]]
    return [
        collate([pack_rows(pack) for pack in packs]),
        collate([pictures[2]]),
        collate([text]),
        collate([pack_rows([several[1], text])]),
    ]


def _text_row(tokenizing: Tokenizing) -> Tokenized:
    turns = (Turn(role="user", text="How many?"), Turn(role="assistant", text="There are 7."))
    return tokenizing(Example(branches=(Branch(turns=turns), Branch(turns=turns))))


def divided_steps(ways: list[Way]) -> list[Step]:
    """One step after the other; the same on every rank."""
    return [divided_step(way) for way in ways]


def divided_step(way: Way) -> Step:
    """The step over all batches, each read by one group of ranks."""
    mesh = make_mesh(way.parallel)
    model = small_model(crop_px=CROP_PX, bidirectional=way.bidirectional, is_tied=way.is_tied)
    shard_model(model, mesh)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=0.1)
    prepare_blocks(model, ComputeConfig(activation_checkpointing=way.computes_again))
    forward = Forward(model, attention=way.attention, mesh=mesh)
    read = batches()
    weight = sum(float(batch.weights.sum()) for batch in read)
    total = torch.zeros(1)
    for batch in read[mesh.dp_rank :: mesh.dp_size]:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.autocasts):
            decoded = forward(batch)
            sums = token_loss(
                decoded.hidden,
                model.lm_head.weight,
                decoded.targets,
                decoded.weights,
                LossConfig(chunk_size=64),
            )
        loss = sums.total / weight
        torch.autograd.backward(loss)
        total += loss.detach()
    if way.with_adamw:
        look(forward, read[0])
    ranks.sum_gradients(parameters)
    ranks.sum_over_ranks(total)
    if not way.with_adamw:
        values = {name: p.grad for name, p in model.named_parameters()}
    else:
        optimizer.step()
        look(forward, read[0])
        split_again(model)
        values = {name: p for name, p in model.named_parameters() if p in optimizer.state}
    return Step(loss=float(total), values={name: _whole(v) for name, v in values.items()})


@torch.no_grad()
def look(forward: Forward, batch: Batch) -> None:
    forward(batch)


def _whole(value: Any) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    found: Tensor = whole.detach().clone()
    return found
