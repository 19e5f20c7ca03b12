"""Training beside its plain form and beside transformers' Trainer, on one core and one model.

All three learn the same examples of the mixture of `sft-debug`, in float32. The unit is tokens that
are learnt a second: what a run is for, whatever else is computed on the way.
Knows: the three ways, the clock. Does not know: the plain algorithms (`plain_training`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.compute import ComputeConfig
from molmo_training.data.example import Tokenized
from molmo_training.data.lanes import Lane, LaneState
from molmo_training.data.lanes import Plan as Draws
from molmo_training.data.loader import collate
from molmo_training.data.packing import Budgets, pack_rows
from molmo_training.data.stream import PackedStream
from molmo_training.forward import Forward
from molmo_training.launch.plan import Plan
from molmo_training.pixels import normalised
from molmo_training.recipes.sft import sft_debug
from molmo_training.train_config import TrainConfig
from molmo_training.trainer import Trainer
from tests.bench.plain_training import padded, plain_batches, plain_step
from tests.bench.preprocessing import one_core
from tests.bench.processes import Row
from tests.support.checkpoint import TINY
from tests.training.test_steps import NoStates

SHORT, LONG = Budgets(n_tokens=2048, n_crops=48), Budgets(n_tokens=8192, n_crops=192)
N_PACKS, N_LONG_PACKS, N_ROUNDS = 12, 2, 3
CONVERSATIONS_PER_BATCH = 8


def rows() -> Iterator[Row]:
    """Examples a second of one loader, learnt tokens a second of one trainer."""
    with one_core():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        try:
            short, long = Plan(_config(SHORT)), Plan(_config(LONG))
            yield from _loading(short)
            packs = _packs(short, N_PACKS)
            learners = {"plain": _Plain(short, packs), "ours": _Ours(short, packs)}
            others = {"transformers' Trainer": _Transformers(short, packs), **learners}
            yield from _stepping("2,048 tokens", packs, others)
            packs = _packs(long, N_LONG_PACKS)
            learners = {"plain": _Plain(long, packs), "ours": _Ours(long, packs)}
            yield from _stepping("8,192 tokens", packs, learners)
        finally:
            torch.set_num_threads(threads)


def _config(budgets: Budgets) -> TrainConfig:
    config = sft_debug()
    data = replace(
        config.data, budgets=budgets, packs_per_step=1, packs_per_batch=1, n_workers=0, held_out=()
    )
    return replace(
        config,
        n_steps=1000,
        model=replace(config.model, start=TINY, residual_dropout=0.0),
        data=data,
        optim=replace(config.optim, muon=False),
        compute=ComputeConfig(device="cpu", autocast_bf16=False, activation_checkpointing=False),
    )


def _loading(plan: Plan) -> Iterator[Row]:
    ours = iter(PackedStream(plan.stream_config, plan.sources))
    plain = plain_batches(Draws(plan.stream_config, plan.sources))
    next(ours), next(plain)  # both buffers are full from here on
    taken = {"plain": [0.0, 0], "ours": [0.0, 0]}
    for _ in range(N_ROUNDS):
        for name, batches in (("plain", plain), ("ours", ours)):
            began = time.perf_counter()
            read = list(islice(batches, N_PACKS))
            taken[name][0] += time.perf_counter() - began
            taken[name][1] += sum(batch.n_examples for batch in read)
    speeds = {name: n / seconds for name, (seconds, n) in taken.items()}
    for name, speed in speeds.items():
        yield f"loader: {name}", speed, "examples/s"
    yield "loader: ours, times plain", speeds["ours"] / speeds["plain"], ""


Learner = Callable[[], None]


def _stepping(
    what: str, packs: Sequence[list[Tokenized]], learners: Mapping[str, Learner]
) -> Iterator[Row]:
    """Rounds alternate; each way learns the same packs, or what is in them."""
    n_learnt = sum(int((row.weights > 0).sum()) for pack in packs for row in pack)
    seconds = dict.fromkeys(learners, 0.0)
    for _ in range(N_ROUNDS):
        for name, learner in learners.items():
            began = time.perf_counter()
            learner()
            seconds[name] += time.perf_counter() - began
    speeds = {name: N_ROUNDS * n_learnt / taken for name, taken in seconds.items()}
    for name, speed in speeds.items():
        yield f"packs of {what}: {name}", speed, "learnt tokens/s"
    for name in speeds:
        if name != "ours":
            yield f"packs of {what}: ours, times {name}", speeds["ours"] / speeds[name], ""


def _packs(plan: Plan, n_packs: int) -> list[list[Tokenized]]:
    """The rows of some packs, each by itself."""
    lane = Lane(Draws(plan.stream_config, plan.sources), 0, LaneState())
    return [lane.next_pack() for _ in range(n_packs)]


class _Ours:
    def __init__(self, plan: Plan, packs: Sequence[list[Tokenized]]) -> None:
        self.batches = [replace(collate([pack_rows(p)]), n_examples=len(p)) for p in packs]
        model = _model(plan)
        self.trainer = Trainer(
            model, plan.config, forward=Forward(model), states=NoStates(), show=lambda figures: None
        )

    def __call__(self) -> None:
        for batch in self.batches:
            self.trainer.advance([batch])


class _Plain:
    def __init__(self, plan: Plan, packs: Sequence[list[Tokenized]]) -> None:
        self.batches = [padded(pack, plan.config.data.budgets) for pack in packs]
        self.model = _model(plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> None:
        for batch in self.batches:
            plain_step(self.model, self.optimizer, batch)


class _Transformers:
    """A row for each conversation, with media of its own, padded to the longest of a batch."""

    def __init__(self, plan: Plan, packs: Sequence[list[Tokenized]]) -> None:
        self.conversations = [
            conversation for pack in packs for row in pack for conversation in _apart(row)
        ]
        self.model = _model(plan)

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=CONVERSATIONS_PER_BATCH,
                num_train_epochs=1,
                learning_rate=1e-5,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = transformers.Trainer(
                model=self.model,
                args=arguments,
                train_dataset=self.conversations,
                data_collator=_side_by_side,
            )
            trainer.train()


Conversation = dict[str, torch.Tensor]


def _apart(row: Tokenized) -> list[Conversation]:
    """The branches of an example as conversations by themselves."""
    ids, subsegments = torch.from_numpy(row.input_ids), torch.from_numpy(row.subsegments)
    branches = [int(n) for n in subsegments.unique() if n != subsegments.max()]
    parts = [(subsegments == n) | (subsegments == subsegments.max()) for n in branches]
    targets, is_learnt = torch.from_numpy(row.targets), torch.from_numpy(row.weights > 0)
    return [
        {
            "input_ids": torch.cat([ids[part], targets[part][-1:]]),
            "labels": torch.cat(
                [torch.tensor([-100]), torch.where(is_learnt, targets, -100)[part]]
            ),
            "crops": normalised(torch.from_numpy(row.crops)),
            "pooling": torch.from_numpy(row.pooling),
        }
        for part in parts or [torch.ones_like(is_learnt)]
    ]


def _side_by_side(conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The inputs of the released classes; a medium of any kind goes as one picture of its crops."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [c["input_ids"] for c in conversations]
    inputs: dict[str, Any] = {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad([c["labels"] for c in conversations], batch_first=True, padding_value=-100),
    }
    seen = [c for c in conversations if len(c["crops"])]
    if seen:
        widest = max(c["pooling"].shape[1] for c in seen)
        inputs |= {
            "pixel_values": torch.cat([c["crops"] for c in seen]),
            "image_token_pooling": torch.cat(
                [F.pad(c["pooling"], (0, widest - c["pooling"].shape[1]), value=-1) for c in seen]
            ),
            "image_grids": torch.tensor([[len(c["pooling"]), 1, 0, 0] for c in seen]),
            "image_num_crops": torch.tensor([len(c["crops"]) for c in seen]),
        }
    return inputs


def _model(plan: Plan) -> Molmo2ForConditionalGeneration:
    model = load_model(open_checkpoint(plan.config.model.start))
    model.train()
    return model
