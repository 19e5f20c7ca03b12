"""A run of molmo2-tiny packaged as a checkpoint: weights, settings, tokenizer, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.errors import CheckpointError
from molmo_core.prompts import render_chat
from molmo_core.tokens import SPECIAL_TOKENS, filler_token
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.export import load_processor
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tree import PREFIX_SUBSEGMENT
from molmo_training.package import package
from molmo_training.pixels import normalised
from molmo_training.recipes.tiny import (
    IMAGES,
    VIDEOS,
    VOCAB_SIZE,
    build_model,
    tiny_config,
)
from molmo_training.runs.run_state import RunState
from molmo_training.vocabulary import load_vocabulary, train_vocabulary
from tests.support.checkpoint import TINY
from tests.support.tiny_runs import write_tiny_settings

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def model() -> Molmo2ForConditionalGeneration:
    return build_model(seed=5)


@pytest.fixture(scope="module")
def weights(model) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    states = RunState(run, is_async=False)
    states.save(7, model=model, optimizers=[], beside=None, data={}, progress={}, config={})
    states.close()
    write_tiny_settings(run)
    (run / "log.jsonl").write_text('{"step": 7}\n')
    return package(run, tmp_path_factory.mktemp("out") / "molmo2-tiny")


def test_weights_are_rounded_once_and_small(checkpoint, weights):
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name].bfloat16()) for name in weights)
    assert (checkpoint / "model.safetensors").stat().st_size <= 16 * MEBIBYTE
    assert (checkpoint / "training_log.jsonl").read_text() == '{"step": 7}\n'


def test_the_shipped_folder_is_what_packaging_writes(checkpoint):
    assert {p.name for p in TINY.iterdir()} == {p.name for p in checkpoint.iterdir()}
    for path in checkpoint.iterdir():
        if path.name not in ("model.safetensors", "training_log.jsonl"):
            assert (TINY / path.name).read_text() == path.read_text(), path.name


def test_config_is_that_of_the_recipe(checkpoint):
    fields = json.loads((checkpoint / "config.json").read_text())
    assert fields["dtype"] == "float32"
    assert fields["bidirectional"] == "all"
    assert fields["model_type"] == "molmo2"
    assert Molmo2Config(**fields).text_config.to_dict() == tiny_config().text_config.to_dict()


def test_processors_have_the_geometry_of_the_recipe(checkpoint):
    processor = load_processor(checkpoint)
    assert processor.image_geometry() == IMAGES
    assert processor.video_geometry() == VIDEOS


@pytest.mark.parametrize("kind", ["image", "images", "video"])
def test_the_processor_gives_the_ids_of_training(checkpoint, tokenizing, kind):
    processor = load_processor(checkpoint)
    rng = np.random.default_rng(4)
    if kind == "video":
        example = video_example(rng, VIDEOS)
        media = {
            "videos": [np.stack(example.frames)],
            "video_metadata": [{"frame_times_s": list(example.frame_times_s)}],
        }
    else:
        example = image_example(rng) if kind == "image" else multi_image_example(rng)
        media = {"images": list(example.images)}
    trained = tokenizing(example)
    prefix = trained.input_ids[trained.subsegments == PREFIX_SUBSEGMENT].tolist()
    for number, branch in enumerate(example.branches):
        text = render_chat(
            branch.turns[:1], n_images=len(example.images), n_videos=int(kind == "video")
        )
        inputs = processor(text=text, return_tensors="np", **media)
        ids = prefix + trained.input_ids[trained.subsegments == number].tolist()
        prompt = inputs["input_ids"][0].tolist()
        assert prompt == ids[: len(prompt)]
        answer = load_vocabulary().tokenizer.decode(ids[len(prompt) :])
        assert answer.startswith(branch.turns[1].text)
    crops = normalised(torch.from_numpy(trained.crops)).numpy()
    if kind == "video":
        assert np.array_equal(inputs["pixel_values_videos"], crops)
    else:  # the one tile of each picture is its whole view: training computes it once
        whole, tile = inputs["pixel_values"][::2], inputs["pixel_values"][1::2]
        assert np.array_equal(whole, crops)
        assert np.array_equal(tile, crops)


def test_a_run_without_state_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of Molmo2; expected .* step\*/"):
        package(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_vocabulary_has_the_specials_behind_its_rows():
    tokenizer = load_vocabulary().tokenizer
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE, VOCAB_SIZE + len(SPECIAL_TOKENS)))
    text = '<|im_start|>user\nPoint to "x" 12.5<im_patch><|im_end|>'
    wrapped = load_vocabulary().for_transformers()
    assert wrapped(text, add_special_tokens=False)["input_ids"] == load_vocabulary().encode(text)


def test_a_learnt_vocabulary_is_padded_to_its_rows():
    tokenizer = train_vocabulary(["red circle", "red star"] * 9, 300)
    n_learnt = tokenizer.token_to_id(filler_token(0))
    assert 259 < n_learnt < 300
    assert tokenizer.token_to_id(filler_token(299 - n_learnt)) == 299
    assert tokenizer.token_to_id("<im_start>") == 300
    assert tokenizer.encode("red").ids != tokenizer.encode("r").ids
