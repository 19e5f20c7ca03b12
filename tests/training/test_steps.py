"""A step is the same however its batch is divided; what is beside it changes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from molmo_core.errors import TrainingError
from molmo_core.prompts import Turn
from molmo_training import ranks
from molmo_training.compute import ComputeConfig, keep_few_kernels
from molmo_training.data.example import Branch, Example, Tokenized
from molmo_training.data.loader import collate
from molmo_training.data.packing import pack_rows
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.dropout import Positions, TokenDropout, set_dropout
from molmo_training.forward import Forward
from molmo_training.loss import LossConfig
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.tiny import build_model
from molmo_training.trainer import HeldOut, Trainer, TrainerConfig
from tests.support.ranks import gathered, run_ranks

UNCLIPPED = GroupConfig(lr=1e-3, warmup_steps=0, max_grad_norm=1e9)
EXACT = TrainerConfig(
    n_steps=10,
    optim=OptimConfig(llm=UNCLIPPED, connector=UNCLIPPED, vit=UNCLIPPED),
    loss=LossConfig(chunk_size=50),
    compute=ComputeConfig(device="cpu", autocast_bf16=False),
)


class NoStates:
    """Keeps nothing."""

    def save(self, step: int, **_: Any) -> None: ...

    def restore(self, **_: Any) -> None: ...

    def wait(self) -> None: ...


def rows_of(tokenizing: Tokenizing) -> list[Tokenized]:
    """Pictures of different length with unequal weights, and a text without any picture."""
    rng = np.random.default_rng(3)
    rows = [tokenizing(image_example(rng, n_branches=n)) for n in (1, 4, 2)]
    turns = (Turn(role="user", text="point to star"), Turn(role="assistant", text="none"))
    rows.append(tokenizing(Example(branches=(Branch(turns=turns, weight=0.3),))))
    return [replace(row, weights=row.weights * (0.5 + k)) for k, row in enumerate(rows)]


def trainer_of(config: TrainerConfig = EXACT, **parts: Any) -> Trainer:
    model = build_model(0)
    positions = set_dropout(model, residual=0.1, response=0.2) if parts.pop("drops", 0) else None
    forward = Forward(model, positions=positions)
    shown = parts.pop("show", lambda figures: None)
    return Trainer(model, config, forward=forward, states=NoStates(), show=shown, **parts)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batches_are_one_big_batch(tokenizing: Tokenizing) -> None:
    rows = rows_of(tokenizing)
    whole, parts = trainer_of(), trainer_of(n_micro_batches=3)
    one = whole.advance([collate(rows)])
    several = parts.advance([collate(rows[:1]), collate(rows[1:3]), collate(rows[3:])])
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for name in ("accuracy", "z_loss", "tokens", "loss_tokens", "loss_weight", "crops"):
        assert several[name] == pytest.approx(one[name], rel=1e-5), name
    assert_same(gradients(whole), gradients(parts))
    assert (parts.at.examples, parts.at.tokens) == (4, sum(len(r.input_ids) for r in rows))


def test_a_pack_is_its_examples_apart(tokenizing: Tokenizing) -> None:
    rows = rows_of(tokenizing)
    packed, apart = trainer_of(), trainer_of(n_micro_batches=len(rows))
    one = packed.advance([collate([pack_rows(rows)])])
    several = apart.advance([collate([row]) for row in rows])
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert several["loss_weight"] == pytest.approx(one["loss_weight"], rel=1e-6)
    assert_same(gradients(packed), gradients(apart))


def _one_of_two(rows: Sequence[Tokenized]) -> list[Any]:
    """What a rank does: uneven shares of the rows, and parameters that only some of them use."""
    rank = dist.get_rank()
    trainer = trainer_of()
    figures = trainer.advance([[collate(rows[:3]), collate(rows[3:])][rank]])
    lone = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    lone[rank].sum().backward()
    ranks.sum_gradients(lone)
    return gathered((figures, gradients(trainer), [p.grad for p in lone], asdict(trainer.at)))


def test_two_ranks_are_one_with_the_batches_of_both(tokenizing: Tokenizing) -> None:
    rows = rows_of(tokenizing)
    alone = trainer_of()
    wanted = alone.advance([collate(rows)])
    for figures, found, lone, at in run_ranks(2, _one_of_two, rows):
        assert figures["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert figures["grad_norm/total"] == pytest.approx(wanted["grad_norm/total"], rel=1e-5)
        assert_same(gradients(alone), found)
        assert [None if g is None else g.tolist() for g in lone] == [[1, 1], [1, 1], None]
        assert at == asdict(alone.at)


@pytest.mark.parametrize("drops", [False, True])
def test_computing_blocks_again_changes_nothing(tokenizing: Tokenizing, drops: bool) -> None:
    batch = collate(rows_of(tokenizing))
    kept = trainer_of(drops=drops)
    config = replace(EXACT, compute=replace(EXACT.compute, activation_checkpointing=False))
    plain = trainer_of(config, drops=drops)
    assert kept.advance([batch])["loss"] == plain.advance([batch])["loss"]
    assert_same(gradients(plain), gradients(kept))


def test_looking_at_held_out_data_disturbs_nothing(tokenizing: Tokenizing) -> None:
    rows = rows_of(tokenizing)
    learnt, others = [collate(rows[:2])], [collate(rows[2:3]), collate(rows[3:])]
    shown: list[Mapping[str, float]] = []
    held_out = [HeldOut(name="val", batches=lambda: others)]
    looking = trainer_of(drops=True, held_out=held_out, show=shown.append)
    plain = trainer_of(drops=True)
    for _ in range(2):
        figures = looking.validate()
        assert looking.advance(learnt)["loss"] == plain.advance(learnt)["loss"]
    sums = trainer_of(n_micro_batches=2)
    sums.model.load_state_dict(looking.model.state_dict())
    after = looking.validate()
    # Without dropout a step tells the same of the same batches before it changes the weights.
    assert sums.advance(others)["loss"] == pytest.approx(after["val/loss"], rel=1e-6)
    assert after["val/loss"] != figures["val/loss"]
    assert [line["step"] for line in shown] == [0, 1, 2]


def test_learnt_and_read_tokens_are_dropped_at_rates_of_their_own() -> None:
    torch.manual_seed(0)
    positions = Positions()
    dropout = TokenDropout(0.1, 0.5, positions)
    positions.learnt = torch.tensor([[True, False]])
    out = dropout(torch.ones(1, 2, 20_000))
    kept = (out != 0).float().mean(-1)[0]
    assert kept.tolist() == pytest.approx([0.5, 0.9], abs=0.02)
    assert out.mean(-1)[0].tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    assert torch.equal(dropout.eval()(torch.ones(1, 2, 3)), torch.ones(1, 2, 3))


def test_one_dropout_is_torchs_own() -> None:
    model = build_model(0)
    assert set_dropout(model, residual=0.1, response=0.0) is None
    assert {block.dropout.p for block in model.model.transformer.blocks} == {0.1}


def test_a_step_with_nothing_to_learn_is_refused(tokenizing: Tokenizing) -> None:
    row = rows_of(tokenizing)[0]
    with pytest.raises(TrainingError, match="step 1 has no token to learn"):
        trainer_of().advance([collate([replace(row, weights=row.weights * 0)])])


def test_few_kernels_are_kept_unless_the_environment_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"
