"""What the gateway knows of a checkpoint: its id, its sizes, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molmo_core.errors import CheckpointError
from molmo_server.checkpoints.folder import read_checkpoint
from tests.support.gateway import write_folder


def test_sizes_and_tokens(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)

    assert checkpoint.max_model_len == 4096
    assert (checkpoint.image.crop_px, checkpoint.image.max_crops) == (56, 4)
    assert checkpoint.image.overlap_margins == (0, 0)
    assert (checkpoint.video.max_frames, checkpoint.video.pooling_hw) == (8, (2, 2))
    assert checkpoint.count_tokens("häß<|im_start|><im_patch>") == 5 + 2
    assert checkpoint.longest_token_chars == len("<low_res_im_start>")


def test_the_length_can_only_be_shortened(folder: Path) -> None:
    assert read_checkpoint(folder, max_model_len=100).max_model_len == 100
    assert read_checkpoint(folder, max_model_len=10**6).max_model_len == 4096


def test_transformers_5_keeps_all_processors_in_one_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "new")
    joint = {
        "image_processor": json.loads((folder / "preprocessor_config.json").read_text()),
        "video_processor": json.loads((folder / "video_preprocessor_config.json").read_text()),
    }
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    (folder / "processor_config.json").write_text(json.dumps(joint))

    checkpoint = read_checkpoint(folder)

    assert (checkpoint.image.crop_px, checkpoint.video.max_frames) == (56, 8)


def test_the_id_changes_with_weights_and_configuration(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a model, ü")
    weights = folder / "model.safetensors"
    first = read_checkpoint(folder).id
    assert first.startswith("a-model---@")
    assert read_checkpoint(folder).id == first

    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = read_checkpoint(folder).id
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"x": 1}))
    third = read_checkpoint(folder).id

    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "config.json of checkpoint 'bad' cannot be read"),
        ("config.json", "{", "config.json of checkpoint 'bad' cannot be read"),
        ("config.json", "{}", "'bad' cannot be used (KeyError('text_config'))"),
        ("config.json", "[]", "'bad' cannot be used"),
        ("tokenizer.json", None, "tokenizer.json of checkpoint 'bad' cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json of checkpoint 'bad' cannot be read"),
        ("preprocessor_config.json", '{"pooling_size": 2}', "'bad' cannot be used"),
    ],
)
def test_unusable_folders(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    folder = write_folder(tmp_path / "bad")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)

    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)

    assert says in caught.value.message
    assert "expected a Hugging Face folder" in caught.value.message
