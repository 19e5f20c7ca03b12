"""A toy training on packed batches with everything that a run has to save: for tests of runs.

A step sums the losses of two packs, which one rank takes one after the other and two ranks take
one each; so a run is the same on both, to the last bit.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.lanes import ReadyRow, SizedRow, StreamConfig
from molmo_training.data.mixture import Group, Part
from molmo_training.data.packing import Budgets
from molmo_training.data.stream import PackedStream
from molmo_training.runs.run_state import RunState

PACKS_A_STEP = 2
VOCABULARY, WIDTH = 32, 16
CONFIG = {"width": WIDTH, "optim": {"rate": 1e-2}}
STREAM = StreamConfig(
    mixture=Group(name="all", parts=(Part(dataset="words"),)),
    budgets=Budgets(n_tokens=40, n_crops=4),
    n_lanes=4,
    buffer_size=4,
    seed=5,
)


@dataclass(frozen=True)
class Words:
    """Rows of random words."""

    def __len__(self) -> int:
        return 40

    def make(self, index: int, rng: np.random.Generator) -> SizedRow:
        n_tokens = int(rng.integers(4, 20))
        ids = rng.integers(VOCABULARY, size=n_tokens)
        ids[0] = index % VOCABULARY
        nothing = np.zeros(n_tokens, dtype=np.int64)
        row = Tokenized(
            input_ids=ids,
            targets=np.roll(ids, -1),
            weights=np.ones(n_tokens, dtype=np.float32),
            position_ids=np.arange(n_tokens),
            subsegments=nothing,
            crops=np.zeros((0, 4, 3), dtype=np.uint8),
            pooling=np.zeros((0, 1), dtype=np.int64),
            patch_targets=np.zeros((0, 4, 8), dtype=np.float32),
            token_targets=np.zeros((0, 8), dtype=np.float32),
            about=nothing,
            shows=nothing,
        )
        return ReadyRow(row)


class ToyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.idle = nn.Linear(2, 2)  # never has a gradient, as a tower in a batch of texts

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.head(self.dropout(torch.tanh(self.layer(self.words(ids)))))
        return x


class ToyRun:
    """One rank of a run; made anew it differs from a saved one in every number."""

    def __init__(
        self, *, seed: int = 0, dropout: float = 0.0, rank: int = 0, world_size: int = 1
    ) -> None:
        torch.manual_seed(seed)
        self.model = ToyModel(dropout)
        if world_size > 1:
            fully_shard(self.model)
        matrices = [self.model.layer.weight]
        rest = [p for p in self.model.parameters() if p is not matrices[0]]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": rest[:1], "name": "words"}, {"params": rest[1:], "name": "rest"}],
                lr=CONFIG["optim"]["rate"],
            ),
            torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
        ]
        self.step, self.rank, self.world_size = 0, rank, world_size
        self.losses: list[float] = []
        self.batches: list[Tensor] = []
        self.read(None)

    def read(self, state: dict[str, Any] | None) -> None:
        self.stream = PackedStream(
            STREAM, {"words": Words()}, rank=self.rank, world_size=self.world_size, state=state
        )
        self._batches = iter(self.stream)

    def advance(self, n_steps: int) -> None:
        for _ in range(n_steps):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = torch.zeros(())
            for batch in islice(self._batches, PACKS_A_STEP // self.world_size):
                loss = loss + self._backward(batch)
            if self.world_size > 1:
                dist.all_reduce(loss)
            for optimizer in self.optimizers:
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.99
            self.step += 1
            self.losses.append(loss.item())

    def _backward(self, batch: Batch) -> Tensor:
        self.batches.append(batch.input_ids)
        logits = self.model(batch.input_ids).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch.targets.flatten()) / PACKS_A_STEP
        torch.autograd.backward(loss * self.world_size)  # sharding averages over ranks
        return loss.detach()

    def save(self, state: RunState) -> None:
        state.save(
            self.step,
            model=self.model,
            optimizers=self.optimizers,
            data=self.stream.state(),
            progress={"step": self.step, "losses": self.losses},
            config=CONFIG,
        )

    def restore(self, state: RunState, step: int | None = None) -> bool:
        saved = state.restore(model=self.model, optimizers=self.optimizers, step=step)
        if saved is not None:
            self.step, self.losses = saved.progress["step"], saved.progress["losses"]
            self.read(saved.data)
        return saved is not None


def curve(n_steps: int, **options: Any) -> list[float]:
    """The losses of a run that nothing interrupts."""
    run = ToyRun(**options)
    run.advance(n_steps)
    return run.losses


def go_on(folder: Path, n_steps: int, **options: Any) -> ToyRun:
    """Train up to `n_steps` from the last whole state, saving each step behind the training."""
    state = RunState(folder, keep=2)
    run = ToyRun(seed=0 if state.latest() is None else 9, **options)
    run.restore(state)
    while run.step < n_steps:
        run.advance(1)
        run.save(state)
    state.close()
    return run


def killed_at(folder: Path, n_steps: int, n_events: int) -> None:
    """Go on up to `n_steps`, and be killed where the folder is touched for the n-th time."""
    torch.set_num_threads(1)
    touched = count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TOUCHES and str(folder) in str(arguments[0]) and next(touched) == n_events:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    go_on(folder, n_steps)


_TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
