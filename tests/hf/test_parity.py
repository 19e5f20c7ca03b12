"""Processor and model against the reference values: ids, pooling, pixels, log-probabilities, text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.image_processing_molmo2 import Molmo2ImageProcessor
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_hf.video_processing_molmo2 import Molmo2VideoProcessor

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
MODELS = ("qwen3", "olmo3")
PIXEL_STEP = 2 / 255 * 2
"""Resizing may round to a neighbouring byte; a byte is 2/255 of the pixel range."""

pytestmark = pytest.mark.skipif(
    not PARITY.is_dir(), reason="the reference values (../shared/parity) are not on this machine"
)


def case_names() -> list[str]:
    path = PARITY / "cases.json"
    return list(json.loads(path.read_text())) if path.exists() else []


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((PARITY / "cases.json").read_text())


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(PARITY / "reference.safetensors")


@pytest.fixture(scope="module")
def processor() -> Molmo2Processor:
    settings = json.loads((PARITY / "processor.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(PARITY / "tokenizer.json"),
        bos_token="<|im_end|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    return Molmo2Processor(
        Molmo2ImageProcessor(**settings["image_processor"]),
        Molmo2VideoProcessor(**settings["video_processor"]),
        tokenizer,
        **settings["processor"],
    )


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, Molmo2ForConditionalGeneration]:
    folder = PARITY / request.param
    config = Molmo2Config(**json.loads((folder / "config.json").read_text()))
    loaded = Molmo2ForConditionalGeneration(config).eval()
    loaded.load_state_dict(load_file(folder / "model.safetensors"))
    return request.param, loaded


def media_of(name: str) -> dict[str, Any]:
    """The case's pictures or frames, as a caller hands them over."""
    clip = PARITY / "media" / f"{name}.npz"
    if clip.exists():
        arrays = np.load(clip)
        metadata = {
            "fps": float(arrays["fps"]),
            "frames_indices": arrays["frames_indices"].tolist(),
            "total_num_frames": int(arrays["total_num_frames"]),
        }
        return {"videos": [arrays["frames"]], "video_metadata": [metadata]}
    pictures = sorted((PARITY / "media").glob(f"{name}_*.png"))
    return {"images": [Image.open(p) for p in pictures]} if pictures else {}


def inputs_of(name: str, cases: dict[str, Any], processor: Molmo2Processor) -> Any:
    return processor(text=cases[name]["text"], return_tensors="pt", **media_of(name))


@pytest.mark.parametrize("name", case_names())
def test_processor_gives_the_reference_inputs(name, cases, reference, processor):
    case, inputs = cases[name], inputs_of(name, cases, processor)
    assert inputs["input_ids"].tolist() == [case["input_ids"]]
    assert inputs["token_type_ids"].tolist() == [case["token_type_ids"]]
    assert inputs["attention_mask"].tolist() == [[1] * len(case["input_ids"])]
    for field in ("image_grids", "image_num_crops", "video_grids"):
        assert (field in inputs) == (field in case)
        assert field not in case or inputs[field].tolist() == case[field]
    for kind in ("image", "video"):
        pooling = reference.get(f"{name}.{kind}_token_pooling")
        if pooling is not None:
            assert torch.equal(inputs[f"{kind}_token_pooling"], pooling.long())


@pytest.mark.parametrize("name", [n for n in case_names() if n != "text_only"])
def test_pixels_are_the_reference_pixels(name, cases, reference, processor):
    inputs = inputs_of(name, cases, processor)
    field = "pixel_values" if "pixel_values" in inputs else "pixel_values_videos"
    pixels, expected = inputs[field], cases[name][field]
    assert list(pixels.shape) == expected["shape"]
    assert pixels.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    sample = reference[f"{name}.{field}.first_patches"]
    differences = (pixels[:, ::97, ::53] - sample).abs()
    assert differences.max() <= PIXEL_STEP
    assert (differences > 1e-6).float().mean() < 1e-3, "rounding may differ here and there only"


@pytest.mark.parametrize("name", case_names())
@torch.no_grad()
def test_model_gives_the_reference_values(name, cases, reference, processor, model):
    architecture, network = model
    inputs = inputs_of(name, cases, processor)
    logits = network(**inputs).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    following = inputs["input_ids"][0, 1:]
    has_logit = following < logits.shape[1]
    found = logprobs[:-1].gather(1, following.where(has_logit, 0)[:, None])[:, 0]
    expected = reference[f"{name}.{architecture}.token_logprobs"]
    torch.testing.assert_close(found.where(has_logit, 0), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        logprobs[-1], reference[f"{name}.{architecture}.last_logprobs"], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", case_names())
@torch.no_grad()
def test_greedy_text_is_the_reference_text(name, cases, processor, model):
    architecture, network = model
    inputs = inputs_of(name, cases, processor)
    expected = cases[name][f"{architecture}.greedy"]
    ids = network.generate(**inputs, do_sample=False, max_new_tokens=len(expected))
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == expected
