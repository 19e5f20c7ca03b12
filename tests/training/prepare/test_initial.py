"""Starting weights as a whole: what a trainer opens, transformers and the command see."""

from __future__ import annotations

import json

import pytest
import torch
from cyclopts import App

from molmo_core.errors import CheckpointError
from molmo_core.tokens import ADDITIONAL_VOCAB_SIZE, SPECIAL_TOKENS
from molmo_hf.export import EMBEDDING, HEAD, load_processor
from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.checkpoints.verify import inputs_of
from molmo_training.prepare.commands import prepare_command
from molmo_training.prepare.initial import INIT_STD, build_initial
from molmo_training.prepare.llms import NEW_EMBEDDING
from molmo_training.prepare.parts import open_part, write_part
from tests.support.pretrained import N_ROWS, plain_tokenizer

LAYERS = (-1, -3)
POOLING, PROJECTOR = (
    "model.vision_backbone.image_pooling_2d.",
    "model.vision_backbone.image_projector.",
)


@pytest.fixture
def app() -> App:
    app = App(name="molmo train", result_action="return_value")
    app.command(prepare_command, name="prepare")
    return app


@pytest.mark.parametrize(
    ("llm", "vit"), [("qwen3", "siglip"), ("olmo3", "clip"), ("qwen3", "dinov2")]
)
def test_the_folder_is_a_checkpoint_of_both_parts(save, tmp_path, llm, vit):
    decoder, tower = open_part(str(save(llm)[0])), open_part(str(save(vit)[0]))
    folder = build_initial(decoder, tower, tmp_path / "start", vit_layers=LAYERS, seed=5)
    opened = open_checkpoint(folder)
    assert opened.differences() == []
    read = opened.weights.read
    for part in (decoder, tower):
        for name in part.weights.shapes():
            assert torch.equal(read(name), part.weights.read(name)), name
    assert opened.images.crop_px == tower.config.image_default_input_size[0]
    assert opened.config.text_config.additional_vocab_size == ADDITIONAL_VOCAB_SIZE
    model = load_model(opened)
    assert opened.has_tied_head() == (llm == "qwen3")
    assert not opened.is_tied
    for values in inputs_of(opened.processor()).values():
        with torch.inference_mode():
            logits = model(**values).logits
        assert logits.isfinite().all()
        assert logits.shape[-1] == N_ROWS


def test_what_is_new_is_drawn_as_molmo2s_training_draws_it(save, tmp_path):
    parts = open_part(str(save("qwen3")[0])), open_part(str(save("siglip")[0]))
    first, same, other = (
        open_checkpoint(build_initial(*parts, tmp_path / name, vit_layers=LAYERS, seed=seed))
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    new = [
        n
        for n in first.weights.shapes()
        if n.startswith((POOLING, PROJECTOR)) or n == NEW_EMBEDDING
    ]
    assert len(new) == 12
    assert first.weights.shapes()[NEW_EMBEDDING] == (128, 64)
    for name in new:
        tensor = first.weights.read(name)
        assert torch.equal(tensor, same.weights.read(name))
        if name.endswith("bias"):
            assert not tensor.any()
            continue
        assert not torch.equal(tensor, other.weights.read(name))
        assert abs(tensor.std() - INIT_STD) < 0.1 * INIT_STD
        assert abs(tensor.mean()) < 0.1 * INIT_STD
    assert torch.equal(first.weights.read(HEAD), first.weights.read(EMBEDDING))


def test_only_layers_that_are_read_are_kept(save, tmp_path):
    parts = open_part(str(save("qwen3")[0])), open_part(str(save("siglip")[0]))
    opened = open_checkpoint(build_initial(*parts, tmp_path / "start", vit_layers=(-3,)))
    layers = {n.split("resblocks.")[1][0] for n in opened.weights.shapes() if "resblocks" in n}
    assert layers == {"0", "1"}
    with pytest.raises(CheckpointError, match=r"layers \(-3, -9\) of a tower of 4"):
        build_initial(*parts, tmp_path / "default")


def test_the_tokenizer_has_molmo2s_tokens_in_order(save, tmp_path):
    parts = open_part(str(save("qwen3")[0])), open_part(str(save("siglip")[0]))
    folder = build_initial(*parts, tmp_path / "start", vit_layers=LAYERS)
    tokenizer = load_processor(folder).tokenizer
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(N_ROWS, N_ROWS + 14))
    for token_id, token in enumerate(SPECIAL_TOKENS, start=N_ROWS):
        assert tokenizer.encode(token, add_special_tokens=False) == [token_id]
    plain = plain_tokenizer()
    words = "Point to the stars: 1 2 3"
    assert tokenizer.encode(words, add_special_tokens=False) == plain.encode(words)
    assert tokenizer.convert_ids_to_tokens(len(plain)) == "|<EXTRA_TOKENS_0>|"


def test_rules_of_the_tokenizers_file_hold_whatever_class_it_names(save):
    folder, _ = save("qwen3")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    found = json.loads(open_part(str(folder)).tokenizer.backend_tokenizer.to_str())
    expected = json.loads(plain_tokenizer().backend_tokenizer.to_str())
    assert found["pre_tokenizer"] == expected["pre_tokenizer"]


def test_the_command_writes_parts_and_wholes(save, tmp_path, app, capsys):
    llm, vit = str(save("qwen3")[0]), str(save("siglip")[0])
    part = tmp_path / "part"
    app(["prepare", "qwen3_0.6b", "--from", llm, "--out", str(part), "--dtype", "bfloat16"])
    assert "holds qwen3_0.6b" in capsys.readouterr().out
    whole = tmp_path / "whole"
    app(
        f"prepare {part} --vit siglip2 --vit-from {vit} --out {whole} --crop-px 42 "
        "--vit-layers -1 --vit-layers -2 --dtype bfloat16"
    )
    opened = open_checkpoint(whole)
    n_all = sum(torch.Size(shape).numel() for shape in opened.weights.shapes().values())
    assert f"a Molmo2 of {part} and siglip2, {n_all:,} parameters" in capsys.readouterr().out
    assert opened.config.adapter_config.vit_layers == [-1, -2]
    assert opened.config.vit_config.image_default_input_size == [42, 42]
    assert opened.weights.read(EMBEDDING).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LLM", "--vit", "LLM"], "a language model is to come first"),
        (["VIT", "--vit", "VIT"], "a language model is to come first"),
        (["LLM", "--vit-from", "VIT"], "say which with --vit"),
        (["LLM", "--crop-px", "28"], "crops belong to a vision tower"),
        (["LLM", "--from", "nowhere"], "'nowhere' is neither a folder"),
    ],
)
def test_what_the_command_cannot_mean_is_refused(save, app, tmp_path, arguments, message):
    named = {"LLM": str(save("qwen3")[0]), "VIT": str(save("siglip")[0])}
    words = [named.get(word, word) for word in arguments]
    with pytest.raises(CheckpointError, match=message):
        app(["prepare", *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_prepared_part_that_was_changed_is_refused(save, tmp_path):
    folder = write_part(open_part(str(save("qwen3")[0])), tmp_path / "part", dtype=torch.float32)
    fields = json.loads((folder / "part.json").read_text())
    fields["config"]["intermediate_size"] = 100
    (folder / "part.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"do not fit the configuration .*ff_proj"):
        open_part(str(folder))
    (folder / "part.json").write_text('{"part": "ear", "name": "x", "config": {}}')
    with pytest.raises(CheckpointError, match="prepare the part again"):
        open_part(str(folder))
