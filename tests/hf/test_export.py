"""Exported folders: their files, stock transformers reading them, saving and loading again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import molmo_hf
from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.bundled_code import rewrite_imports
from molmo_hf.export import load_processor, save_checkpoint
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from tests.support.reference_values import (
    ARCHITECTURES,
    CASES,
    FOLDER,
    inputs_of,
    reference_config,
    reference_model,
    reference_tensors,
    reference_tokenizer,
)

READER = Path(__file__).parent / "stock_reader.py"
SETTINGS = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def export(architecture: str, folder: Path, **settings: Any) -> Path:
    return save_checkpoint(
        settings.pop("weights", None) or reference_model(architecture),
        folder,
        config=reference_config(architecture),
        tokenizer=reference_tokenizer(),
        **settings,
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(name, folder / name, with_code=True) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def stock_answers(exports, tmp_path_factory) -> dict[str, Any]:
    """What stock transformers makes of the folders, in a process without our packages."""
    home = tmp_path_factory.mktemp("hf_home")
    done = subprocess.run(
        [sys.executable, str(READER), str(FOLDER), *map(str, exports.values())],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_transformers_gives_the_reference_values(stock_answers, architecture):
    answers, reference = stock_answers[architecture], reference_tensors()
    assert answers["module"].startswith("transformers_modules.")
    assert answers["dtype"] == "torch.float32"
    for case in ("two_images", "video_25fps_13f", "text_only"):
        expected = CASES[case][f"{architecture}.greedy"][:8]
        assert answers[case]["ids"] == CASES[case]["input_ids"]
        assert answers[case]["greedy"][: len(expected)] == expected
        logprobs = torch.tensor(answers[case]["last_logprobs"])
        difference = logprobs - reference[f"{case}.{architecture}.last_logprobs"]
        assert difference.abs().max() < 1e-3


def test_stock_transformers_renders_and_tokenizes_a_chat(stock_answers):
    content = "<|image|><|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    processor = molmo_hf.Molmo2Processor(
        molmo_hf.Molmo2ImageProcessor(), molmo_hf.Molmo2VideoProcessor(), reference_tokenizer()
    )
    picture = FOLDER / "media" / "image_57x43_0.png"
    expected = processor(text=content, images=str(picture))["input_ids"][0]
    assert {tuple(stock_answers[name]["chat"]) for name in ARCHITECTURES} == {tuple(expected)}


def test_what_stock_transformers_saved_is_read_natively(stock_answers, exports):
    saved = exports["olmo3"] / "saved"
    processor = load_processor(saved)
    assert type(processor) is molmo_hf.Molmo2Processor
    inputs = inputs_of("two_images", processor)
    assert inputs["input_ids"].tolist() == [CASES["two_images"]["input_ids"]]
    molmo_hf.register()
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(model) is Molmo2ForConditionalGeneration
    assert_same_weights(model, reference_model("olmo3"))


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_classes_read_the_folder_without_remote_code(exports, architecture):
    molmo_hf.register()
    molmo_hf.register()
    folder = exports[architecture]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    assert type(model) is Molmo2ForConditionalGeneration
    assert type(processor) is molmo_hf.Molmo2Processor
    assert_same_weights(model, reference_model(architecture))
    inputs = inputs_of("three_images", processor)
    assert inputs["input_ids"].tolist() == [CASES["three_images"]["input_ids"]]
    config, expected = AutoConfig.from_pretrained(folder), reference_config(architecture)
    assert config.text_config.rope_parameters == expected.text_config.rope_parameters
    assert config.text_config.rope_scaling_layers == expected.text_config.rope_scaling_layers
    assert config.bidirectional == "all"


def test_the_folder_holds_what_every_reader_looks_for(exports):
    folder = exports["olmo3"]
    names = {path.name for path in folder.iterdir() if path.is_file()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == SETTINGS | {"model.safetensors"}
    video = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert video["video_processor_type"] == "Molmo2VideoProcessor", "vLLM's loader looks for it"
    assert video["num_frames"] == 384
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["rope_scaling"]["rope_type"] == "yarn"
    assert config["auto_map"]["AutoConfig"] == "configuration_molmo2.Molmo2Config"
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    for name in code:
        source = (folder / name).read_text()
        compile(source, name, "exec")
        assert "molmo_core" not in source.replace("`molmo_core", "")


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_geometry_survives(tmp_path):
    images = ImageGeometry(max_crops=3, overlap_margins=(2, 3), use_single_crop_col_tokens=None)
    videos = VideoGeometry(
        pooling_hw=(2, 2), sample_mode="fps", max_frames=17, max_fps=None, use_col_tokens=True
    )
    videos = replace(videos, use_frame_special_tokens=False, sampling_fps=4.0)
    folder = export("qwen3", tmp_path / "out", images=images, videos=videos)
    processor = load_processor(folder)
    assert processor.image_geometry() == images
    assert processor.video_geometry() == videos
    processor.save_pretrained(tmp_path / "again")
    again = load_processor(tmp_path / "again")
    assert (again.image_geometry(), again.video_geometry()) == (images, videos)
    assert again.chat_template == processor.chat_template


def test_stored_narrow_computed_wide(tmp_path):
    folder = export("qwen3", tmp_path / "out", dtype=torch.bfloat16, compute_dtype=torch.float32)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    molmo_hf.register()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float32
    exact = reference_model("qwen3").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16().float())


def test_large_models_are_cut_into_several_files(tmp_path):
    folder = export("qwen3", tmp_path / "out", shard_bytes=1_000_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 4
    molmo_hf.register()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert_same_weights(model, reference_model("qwen3"))


def test_a_tied_head_is_written_out(tmp_path):
    model = reference_model("qwen3")
    tensors = model.state_dict()
    del tensors["lm_head.weight"]
    folder = export("qwen3", tmp_path / "out", weights=tensors)
    with safe_open(folder / "model.safetensors", "pt") as file:
        head = file.get_tensor("lm_head.weight")
    assert torch.equal(head, tensors["model.transformer.wte.embedding"])


def test_a_folder_is_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export("qwen3", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="126 px"):
        export("qwen3", tmp_path / "a", images=ImageGeometry(crop_px=126))
    with pytest.raises(CheckpointError, match="videos"):
        export("qwen3", tmp_path / "b", videos=VideoGeometry(patch_px=7))
    config = reference_config("qwen3")
    config.text_config.vocab_size = 400
    with pytest.raises(CheckpointError, match="400 to 413"):
        save_checkpoint({}, tmp_path / "c", config=config, tokenizer=reference_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_has_no_processor(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_processor(tmp_path)


def test_bundling_refuses_imports_that_are_not_bundled():
    with pytest.raises(ValueError, match=r"molmo_core\.clips"):
        rewrite_imports("from molmo_core.clips import draw_clip\n", "molmo_hf")
    assert rewrite_imports("import av\n", "molmo_core").splitlines() == [
        "try:",
        "    import av",
        "except ImportError:",
        "    av = None",
    ]
