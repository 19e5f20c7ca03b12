"""Adapters: they change nothing at first, train alone, are saved, merged and opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from molmo_core.errors import CheckpointError, TrainingError
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    WHOLE_FILE,
    load_adapters,
    read_adapters,
    save_adapters,
    trained_state,
    write_adapter_config,
)
from molmo_training.checkpoints.convert import to_adapter_folder, to_hugging_face
from molmo_training.checkpoints.opened import RUN_SETTINGS, Kind, load_model, open_checkpoint
from molmo_training.checkpoints.verify import compare, inputs_of
from molmo_training.lora import CONNECTOR, DECODER, TOWER, LoraConfig, LoraLinear, add_adapters
from molmo_training.runs.run_state import RunState
from tests.support.checkpoint import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.sharded_adapters import trained_alone, trained_in_ranks

EVERYWHERE = LoraConfig(rank=4, alpha=6, targets=DECODER + CONNECTOR + TOWER)


@pytest.fixture(scope="module", params=["qwen3", "olmo3"])
def start(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("start") / request.param, request.param)


@pytest.fixture(scope="module")
def inputs(start) -> dict[str, dict[str, torch.Tensor]]:
    every = inputs_of(open_checkpoint(start).processor())
    return {name: every[name] for name in ("text", "small picture", "clip")}


def logits(model: Molmo2ForConditionalGeneration, inputs) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.eval()(**values).logits for values in inputs.values()]


def train(model: Molmo2ForConditionalGeneration, inputs, n_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = inputs["small picture"]
    labels = values["input_ids"].clamp(max=model.config.text_config.vocab_size - 1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model.train()(**values, labels=labels).loss.backward()
        optimizer.step()


def test_new_adapters_change_nothing_and_alone_are_trained(start, inputs):
    model = load_model(open_checkpoint(start))
    before, n_before = logits(model, inputs), sum(p.numel() for p in model.parameters())
    counts = add_adapters(model, EVERYWHERE)
    assert all(torch.equal(a, b) for a, b in zip(before, logits(model, inputs), strict=True))
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    n_added = sum(4 * (m.in_features + m.out_features) for m in layers)
    assert sum(c.n_trained for c in counts) == n_added
    assert sum(c.n_frozen for c in counts) == n_before
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, inputs)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], p) and named[n].grad is None for n, p in frozen.items())
    assert all(n.endswith(("lora_a", "lora_b")) for n, p in named.items() if p.grad is not None)
    assert sum(p.grad is not None for p in named.values()) == 2 * len(layers)
    fused = model.model.transformer.blocks[0].self_attn.att_proj
    assert isinstance(fused, LoraLinear)
    assert fused.lora_b.abs().max() > 0


def test_the_merged_export_computes_what_the_adapters_compute(start, inputs, tmp_path):
    model = load_model(open_checkpoint(start))
    whole = "model.transformer.ln_f.weight"
    config = LoraConfig(rank=4, alpha=6, targets=EVERYWHERE.targets, trained=(whole,))
    add_adapters(model, config)
    train(model, inputs)
    save_adapters(trained_state(model), tmp_path / "adapters", config, start=start)
    assert (tmp_path / "adapters" / WHOLE_FILE).exists()
    opened = open_checkpoint(tmp_path / "adapters")
    assert opened.kind is Kind.ADAPTERS
    export = to_hugging_face(opened, tmp_path / "export")
    merged = load_model(open_checkpoint(export))
    trained = logits(model, inputs)
    for a, b in zip(trained, logits(merged, inputs), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    again = load_model(open_checkpoint(start))
    add_adapters(again, config, seed=1)
    load_adapters(again, tmp_path / "adapters")
    assert all(torch.equal(a, b) for a, b in zip(trained, logits(again, inputs), strict=True))
    untrained = logits(load_model(open_checkpoint(start)), inputs)
    assert max((a - b).abs().max() for a, b in zip(trained, untrained, strict=True)) > 0.1


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`start` and `adapters` in one folder, the second naming the first by a relative path."""
    folder = tmp_path_factory.mktemp("saved")
    write_checkpoint(folder / "start", "qwen3")
    model = load_model(open_checkpoint(folder / "start"))
    config = LoraConfig(rank=2)
    add_adapters(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapters(trained_state(model), folder / "adapters", config, start=folder / "start")
    fields = json.loads((folder / "adapters" / ADAPTER_CONFIG).read_text())
    fields["base_model_name_or_path"] = "../start"
    (folder / "adapters" / ADAPTER_CONFIG).write_text(json.dumps(fields))
    return folder


def test_the_files_are_in_the_layout_of_peft(saved):
    from safetensors import safe_open

    fields = json.loads((saved / "adapters" / ADAPTER_CONFIG).read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 2, 32.0)
    layer = "model.transformer.blocks.0.self_attn.att_proj"
    assert layer in fields["target_modules"]
    with safe_open(saved / "adapters" / ADAPTER_FILE, "pt") as file:
        names = set(file.keys())
    assert {f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"} <= names
    assert len(names) == 2 * len(fields["target_modules"])


def save_run(run: Path, saved: Path) -> None:
    """A run whose state holds weights and adapters and whose settings say so."""
    model = load_model(open_checkpoint(saved / "start"))
    config = LoraConfig(rank=2)
    add_adapters(model, config)
    load_adapters(model, saved / "adapters")
    (run / RUN_SETTINGS).mkdir(parents=True)
    for file in (saved / "start").iterdir():
        if file.suffix in (".json", ".jinja"):
            (run / RUN_SETTINGS / file.name).write_bytes(file.read_bytes())
    write_adapter_config(run / RUN_SETTINGS, config)
    state = RunState(run, is_async=False)
    state.save(3, model=model, data={}, progress={}, config={})
    state.wait()


def test_the_state_of_a_run_with_adapters_opens_merged(saved, tmp_path):
    save_run(tmp_path / "run", saved)
    start, run = open_checkpoint(saved / "start"), tmp_path / "run"
    from_run, from_files = open_checkpoint(run), open_checkpoint(saved / "adapters")
    assert from_run.step == 3
    assert from_run.weights.shapes() == start.weights.shapes()
    assert max(d.max_logprob for d in compare(from_run, from_files)) == 0.0
    assert max(d.max_logprob for d in compare(from_run, start)) > 1e-3


def test_the_adapters_of_a_run_are_written_by_themselves(saved, tmp_path):
    run, start = tmp_path / "run", saved / "start"
    save_run(run, saved)
    found = read_adapters(to_adapter_folder(run, tmp_path / "out", start=start))
    expected = read_adapters(saved / "adapters")
    assert found.shapes() == expected.shapes()
    assert all(torch.equal(found.read(n), expected.read(n)) for n in expected.shapes())
    assert open_checkpoint(tmp_path / "out").folder == tmp_path / "out"
    with pytest.raises(CheckpointError, match="'start' is no run with adapters"):
        to_adapter_folder(start, tmp_path / "other", start=start)
    other = write_checkpoint(tmp_path / "olmo3", "olmo3")
    with pytest.raises(CheckpointError, match="trained from another model"):
        to_adapter_folder(run, tmp_path / "other", start=other)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "../gone"}, "'../gone' .* is not there"),
        ({"base_model_name_or_path": ""}, "is not there"),
        ({"peft_type": "IA3"}, "only plain LoRA"),
        ({"use_dora": True}, "only plain LoRA"),
        ({"r": None}, "lacks or spoils a field"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(saved, tmp_path, change, message):
    folder = tmp_path / "x" / "adapters"
    folder.mkdir(parents=True)
    (tmp_path / "x" / "start").symlink_to(saved / "start")
    fields = json.loads((saved / "adapters" / ADAPTER_CONFIG).read_text()) | change
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields))
    (folder / ADAPTER_FILE).write_bytes((saved / "adapters" / ADAPTER_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_adapters_of_another_model_are_refused(saved, tmp_path):
    other = write_checkpoint(tmp_path / "start", "olmo3")  # one key head more: other shapes
    (tmp_path / "adapters").symlink_to(saved / "adapters")
    config = json.loads((saved / "adapters" / ADAPTER_CONFIG).read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    config["base_model_name_or_path"] = str(other)
    (moved / ADAPTER_CONFIG).write_text(json.dumps(config))
    (moved / ADAPTER_FILE).write_bytes((saved / "adapters" / ADAPTER_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="trained from another model"):
        open_checkpoint(moved)
    model = load_model(open_checkpoint(saved / "start"))
    add_adapters(model, LoraConfig(rank=3))
    with pytest.raises(CheckpointError, match="give the model the same LoraConfig"):
        load_adapters(model, saved / "adapters")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ("model.decoder.*",)}, "no linear layer is called 'model.decoder"),
        ({"targets": ("*",)}, "'lm_head' can have no adapter"),
        ({"trained": ("*.att_proj.weight",)}, "would have an adapter and be trained whole"),
        ({"rank": 0}, "ranks from 1"),
        ({"dropout": 1.0}, "ranks from 1"),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(saved, config, message):
    model = load_model(open_checkpoint(saved / "start"))
    with pytest.raises(TrainingError, match=message):
        add_adapters(model, LoraConfig(**config))


def test_a_model_without_numbers_is_counted_alike(saved):
    """A dry run plans on the meta device."""
    opened = open_checkpoint(saved / "start")
    with torch.device("meta"):
        empty = Molmo2ForConditionalGeneration(opened.config)
    config = LoraConfig(rank=2, trained=("*.ln_f.weight",))
    assert add_adapters(empty, config) == add_adapters(load_model(opened), config)
    assert all(p.is_meta for p in empty.parameters())


def test_dropout_is_of_training_only(saved, inputs):
    model = load_model(open_checkpoint(saved / "start"))
    add_adapters(model, LoraConfig(rank=2, dropout=0.5))
    load_adapters(model, saved / "adapters")
    ids = torch.arange(1, 30)[None]
    first, second = (model.eval()(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(model.train()(input_ids=ids).logits, first)


def test_two_ranks_train_save_and_load_what_one_does(tmp_path):
    start = write_checkpoint(tmp_path / "start", "qwen3")
    expected = trained_alone(start, n_steps=3)
    for found in run_ranks(2, trained_in_ranks, tmp_path):
        assert found.keys() == expected.keys()
        assert max((found[n] - expected[n]).abs().max() for n in expected) <= 1e-6
    two = trained_alone(start, n_steps=2)
    weights = read_adapters(tmp_path / "adapters")
    assert max((weights.read(n) - two[n]).abs().max() for n in two) <= 1e-6
    assert max(t.abs().max() for n, t in two.items() if n.endswith("lora_b")) > 1e-3
