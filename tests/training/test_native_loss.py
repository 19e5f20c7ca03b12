"""From rows to the loss of a step: the reference's own sums, each example alone and all packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.compute import ComputeConfig
from molmo_training.data.loader import collate
from molmo_training.data.packing import pack_rows
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import Forward
from molmo_training.loss import LossConfig, token_loss
from molmo_training.trainer import Trainer
from tests.training.formatting.test_native_rows import CASES, NATIVE, formatted
from tests.training.test_steps import EXACT, NoStates, gradients


@pytest.mark.parametrize("name", ["olmo3", "qwen3_tied"])
def test_the_loss_of_a_step_is_the_references(name: str, native_tokenizing: Tokenizing) -> None:
    form = "-unsharded" if name == "qwen3_tied" else ""
    cases = [case for case in CASES if case.startswith(name)]
    rows = [formatted(case, native_tokenizing) for case in cases]
    model = load_model(open_checkpoint(NATIVE / f"{name}{form}"))
    forward, config = Forward(model, attention="dense"), LossConfig(z_weight=0.0, chunk_size=64)
    with torch.no_grad():
        for case, row in zip(cases, rows, strict=True):
            decoded = forward(collate([row]))
            sums = token_loss(
                decoded.hidden, model.lm_head.weight, decoded.targets, decoded.weights, config
            )
            assert sums.total.item() == pytest.approx(CASES[case]["weighted_loss_sum"], rel=1e-4)
            assert sums.weight.item() == pytest.approx(CASES[case]["weight_sum"], rel=1e-5)
    wanted = sum(CASES[case]["weighted_loss_sum"] for case in cases)
    wanted /= sum(CASES[case]["weight_sum"] for case in cases)
    packed = replace(
        EXACT,
        loss=config,
        compute=ComputeConfig(device="cpu", autocast_bf16=False, attention="dense"),
    )
    trainer = Trainer(model, packed, forward=forward, states=NoStates(), show=lambda figures: None)
    figures = trainer.advance([collate([pack_rows(rows)])])
    assert figures["loss"] == pytest.approx(wanted, rel=1e-4)
    assert len(gradients(trainer)) == len(list(model.parameters()))
