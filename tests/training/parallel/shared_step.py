"""A small model, mixed batches, and the loss and gradients of a step however it is divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from molmo_core.prompts import Turn
from molmo_hf.configuration_molmo2 import (
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VitConfig,
)
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training import ranks
from molmo_training.compute import ComputeConfig, prepare_blocks
from molmo_training.data.example import Batch, Branch, Example, Tokenized
from molmo_training.data.loader import collate
from molmo_training.data.packing import pack_rows
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import AttentionKind, Forward
from molmo_training.loss import LossConfig, token_loss
from molmo_training.parallel import ParallelConfig, make_mesh, shard_model
from molmo_training.recipes.tiny import CROP_PX, IMAGES, PATCH_PX, VIDEOS, VOCAB_SIZE
from molmo_training.vocabulary import load_vocabulary


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is divided and attended."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionKind = "blocks"
    bidirectional: str = "all"
    with_adamw: bool = False
    """Give weights after a step of AdamW in the place of gradients."""
    is_tied: bool = False
    computes_again: bool = False
    """Blocks in the backward pass, as trainers do."""


@dataclass(frozen=True, kw_only=True)
class Step:
    loss: float
    values: dict[str, Tensor]
    """Gradients, or weights, by name."""


def small_model(way: Way) -> Molmo2ForConditionalGeneration:
    """Two layers everywhere, two queries to a head of keys."""
    vit = Molmo2VitConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        image_default_input_size=(CROP_PX, CROP_PX),
        image_patch_size=PATCH_PX,
        image_num_pos=(CROP_PX // PATCH_PX) ** 2,
    )
    adapter = Molmo2AdapterConfig(
        vit_layers=(-1, -2),
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        text_hidden_size=32,
    )
    text = Molmo2TextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        qkv_bias=False,
        num_hidden_layers=2,
        intermediate_size=48,
        rope_theta=10_000.0,
        use_qk_norm=True,
        qk_norm_type="qwen3",
        tie_word_embeddings=way.is_tied,
    )
    config = Molmo2Config(
        vit_config=vit,
        adapter_config=adapter,
        text_config=text,
        bidirectional=way.bidirectional,
        tie_word_embeddings=way.is_tied,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    model = Molmo2ForConditionalGeneration(config)
    if way.is_tied:
        model.lm_head.weight = model.model.transformer.wte.embedding
    return model.train()


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
    model = small_model(way)
    shard_model(model, mesh)
    prepare_blocks(model, ComputeConfig(activation_checkpointing=way.computes_again))
    forward = Forward(model, attention=way.attention, mesh=mesh)
    read = batches()
    weight = sum(float(batch.weights.sum()) for batch in read)
    total = torch.zeros(1)
    for batch in read[mesh.dp_rank :: mesh.dp_size]:
        decoded = forward(batch)
        head = model.lm_head.weight
        sums = token_loss(
            decoded.hidden, head, decoded.targets, decoded.weights, LossConfig(chunk_size=64)
        )
        loss = sums.total / weight
        torch.autograd.backward(loss)
        total += loss.detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ranks.sum_gradients(parameters)
    ranks.sum_over_ranks(total)
    if not way.with_adamw:
        values = {name: p.grad for name, p in model.named_parameters()}
    else:
        torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=0.1).step()
        values = dict(model.named_parameters())
    return Step(loss=float(total), values={name: _whole(v) for name, v in values.items()})


def _whole(value: Any) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    found: Tensor = whole.detach().clone()
    return found
