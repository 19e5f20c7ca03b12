"""`--set`: what it sets, and what it says of what it cannot set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from molmo_core.errors import TrainingError
from molmo_training.launch.overrides import overridden
from molmo_training.lora import LoraConfig
from molmo_training.recipes.sft import sft
from molmo_training.train_config import TrainConfig


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return sft()


def test_values_have_the_types_of_their_fields(config: TrainConfig) -> None:
    changed = overridden(
        config,
        [
            "n_steps=12",
            "optim.llm.lr=2e-5",
            "optim.betas=0.8,0.99",
            "max_seconds=none",
            "saving.keep=None",
            "data.leave_out_missing=True",
            "compute.device=cpu",
            "model.start=a/b",
            "model.freeze=lm_head.weight",
            "saving.evaluation=molmo,eval,run",
            'data.files=["x y.jsonl"]',
            "data.max_crops= 4",
            "saving.publish_name=7",
        ],
    )
    assert (changed.n_steps, changed.optim.llm.lr, changed.optim.betas) == (12, 2e-5, (0.8, 0.99))
    assert changed.optim.connector == config.optim.connector
    assert (changed.max_seconds, changed.saving.keep) == (None, None)
    assert changed.data.leave_out_missing is True
    assert (changed.compute.device, changed.model.start) == ("cpu", Path("a/b"))
    assert changed.model.freeze == ("lm_head.weight",)
    assert changed.saving.evaluation == ("molmo", "eval", "run")
    assert (changed.data.files, changed.data.max_crops) == ((Path("x y.jsonl"),), 4)
    assert changed.saving.publish_name == "7"
    assert config.n_steps == 30_000


def test_parts_of_a_mixture_are_named(config: TrainConfig) -> None:
    changed = overridden(
        config,
        [
            "data.mixture.nlp.rate=0.5",
            "data.mixture.tracking.ground.rate=0",
            "data.mixture.parts.demo.pixmo_cap.as_size=7",
        ],
    )
    groups = {part.name: part for part in changed.data.mixture.parts if hasattr(part, "name")}
    assert groups["nlp"].rate == 0.5
    inner = {part.name: part.rate for part in groups["tracking"].parts}
    assert (inner["ground"], inner["track"]) == (0, 0.4)
    caps = {part.dataset: part.as_size for part in groups["demo"].parts}
    assert (caps["pixmo_cap"], caps["molmo2_human_qa"]) == (7, None)


def test_what_was_absent_begins_with_its_defaults(config: TrainConfig) -> None:
    assert overridden(config, ["model.lora.rank=4"]).model.lora == LoraConfig(rank=4)
    assert overridden(config, ['model.lora={"rank": 3}']).model.lora == LoraConfig(rank=3)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("n_step=3", "there is no setting n_step; near are n_steps"),
        ("optim.lmm.lr=3", "there is no setting optim.lmm.lr; near are optim.llm.lr"),
        ("qqq=3", "there is no setting qqq; in its place are compute, data, "),
        ("n_steps=ten", "n_steps cannot be 'ten'; allowed is a whole number"),
        ("n_steps=1.5", "n_steps cannot be '1.5'; allowed is a whole number"),
        ("n_steps=", "n_steps cannot be ''; allowed is a whole number"),
        ("n_steps=none", "n_steps cannot be 'none'"),
        ("max_seconds=soon", "allowed is a number or None"),
        ("optim.muon=2", "optim.muon cannot be '2'; allowed is true or false"),
        ("optim.betas=0.9", "allowed is items with commas: a number, a number"),
        ("compute.device=tpu", "allowed is one of 'auto', 'cpu', 'cuda'"),
        ("n_steps", "is no assignment; write name=value, such as n_steps=100"),
        ("n_steps.x=3", "there is nothing in 30000 to be set by a name"),
        ("n_steps=0", "n_steps=0: n_steps is 0; at least 1 step is trained"),
        ("model.residual_dropout=1", "allowed is 0 to below 1"),
        ("data.packs_per_batch=0", "data.packs_per_batch is 0; allowed is 1 and more"),
        ("data.mixture.parts.nlq.rate=1", "there is no nlq; there are nlp"),
        ("data.mixture.parts.nlp=1", "set a field of it"),
        ("data.format.system_prompt=demo_or_style", "use 'demo_or_style_v2'"),
    ],
)
def test_what_cannot_be_set_is_said(config: TrainConfig, assignment: str, message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        overridden(config, [assignment])
    assert message in caught.value.message


def test_what_is_printed_is_what_was_given(config: TrainConfig) -> None:
    changed = replace(config, n_steps=3)
    assert changed.document()["n_steps"] == 3
    assert changed.document()["optim"]["betas"] == [0.9, 0.95]
    assert changed.document()["model"]["start"] is None
