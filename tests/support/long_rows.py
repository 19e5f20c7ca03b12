"""Rows of long-context training: a video at full size with questions, packed with conversations;
and a step over one, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from molmo_core.images import ImageGeometry
from molmo_core.prompts import Turn
from molmo_core.videos import VideoGeometry
from molmo_training.data.example import Batch, Branch, Example, Tokenized
from molmo_training.data.loader import collate
from molmo_training.data.packing import pack_rows
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import Decoded, Forward
from molmo_training.loss import LossConfig, token_loss
from molmo_training.vocabulary import load_vocabulary
from tests.support.peak_memory import count_anew, peak_mib

CROP_PX = 378
TOKENS_A_FRAME = 96
"""Of a row: 384 frames in 36,864 tokens, of which 89 are the frame and its time."""


def long_batch(n_tokens: int) -> Batch:
    """One row of exactly `n_tokens`, with as many frames as long-context training has in it."""
    rng = np.random.default_rng(0)
    tokenizing = Tokenizing(
        encode=load_vocabulary().encode, images=ImageGeometry(), videos=VideoGeometry()
    )
    n_frames = n_tokens // TOKENS_A_FRAME
    frames = [rng.integers(0, 255, (CROP_PX, CROP_PX, 3), dtype=np.uint8) for _ in range(n_frames)]
    times_s = [number / 2 for number in range(n_frames)]
    about_video = tuple(_branch(f"How many objects are blue at {k}?", 30) for k in range(3))
    rows = [tokenizing(Example(frames=frames, frame_times_s=times_s, branches=about_video))]
    while (n_missing := n_tokens - sum(len(row.input_ids) for row in rows)) > 0:
        row = tokenizing(Example(branches=(_branch("Count to 100.", 60), _branch("Again.", 60))))
        rows.append(_cut(row, n_missing))
    return collate([_cut(pack_rows(rows), n_tokens)])


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    decoded: Decoded
    loss: Tensor
    seconds: float
    """Of forward and backward pass."""
    step_mib: float
    """The most memory beyond model and batch."""


def measured_step(forward: Forward, batch: Batch) -> MeasuredStep:
    """A step of this process; gradients are left at the parameters."""
    before, began = count_anew(), time.perf_counter()
    decoded = forward(batch)
    head = forward.model.lm_head.weight
    sums = token_loss(decoded.hidden, head, decoded.targets, decoded.weights, LossConfig())
    loss = sums.total / batch.weights.sum()
    torch.autograd.backward(loss)
    return MeasuredStep(
        decoded=decoded,
        loss=loss.detach(),
        seconds=time.perf_counter() - began,
        step_mib=peak_mib() - before,
    )


def _branch(question: str, n_words: int) -> Branch:
    answer = " ".join(str(number % 100) for number in range(n_words))
    return Branch(turns=(Turn(role="user", text=question), Turn(role="assistant", text=answer)))


def _cut(row: Tokenized, n_tokens: int) -> Tokenized:
    """The first tokens of a row, which are all that its media take."""
    length = len(row.input_ids)
    names = [f.name for f in fields(row) if getattr(row, f.name).shape == (length,)]
    return replace(row, **{name: getattr(row, name)[:n_tokens] for name in names})
