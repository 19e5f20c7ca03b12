"""Processor and model against the reference: ids, pooling, pixels, log-probabilities, text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.processing_molmo2 import Molmo2Processor
from tests.support.reference_values import (
    ARCHITECTURES,
    CASES,
    inputs_of,
    reference_model,
    reference_processor,
    reference_tensors,
)

PIXEL_STEP = 2 / 255 * 2
"""Resizing may round to a neighbouring byte; a byte is 2/255 of the pixel range."""

Model = tuple[str, Molmo2ForConditionalGeneration]
VISUAL_CASES = [name for name in CASES if name != "text_only"]


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return reference_tensors()


@pytest.fixture(scope="module")
def processor() -> Molmo2Processor:
    return reference_processor()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Model:
    return request.param, reference_model(request.param)


@pytest.fixture(scope="module")
def inputs(processor) -> dict[str, Any]:
    return {name: inputs_of(name, processor) for name in CASES}


def test_the_cases_are_of_every_kind():
    fields = {field for case in CASES.values() for field in case}
    assert {"image_grids", "video_grids"} <= fields
    assert len(CASES) == 13
    assert max(len(case.get("image_grids", [])) for case in CASES.values()) == 3


@pytest.mark.parametrize("name", CASES)
def test_processor_gives_the_reference_inputs(name, inputs, reference):
    case, found = CASES[name], inputs[name]
    assert found["input_ids"].tolist() == [case["input_ids"]]
    assert found["token_type_ids"].tolist() == [case["token_type_ids"]]
    assert found["attention_mask"].tolist() == [[1] * len(case["input_ids"])]
    for field in ("image_grids", "image_num_crops", "video_grids"):
        assert (field in found) == (field in case)
        assert field not in case or found[field].tolist() == case[field]
    for field in ("image_token_pooling", "video_token_pooling"):
        pooling = reference.get(f"{name}.{field}")
        assert (field in found) == (pooling is not None)
        assert pooling is None or torch.equal(found[field], pooling.long())


@pytest.mark.parametrize("name", VISUAL_CASES)
def test_pixels_are_the_reference_pixels(name, inputs, reference):
    found = inputs[name]
    field = "pixel_values" if "pixel_values" in found else "pixel_values_videos"
    pixels, expected = found[field], CASES[name][field]
    assert list(pixels.shape) == expected["shape"]
    assert pixels.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    sample = reference[f"{name}.{field}.first_patches"]
    differences = (pixels[:, ::97, ::53] - sample).abs()
    assert differences.max() <= PIXEL_STEP
    assert (differences > 1e-6).float().mean() < 1e-3, "rounding may differ here and there only"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_model_gives_the_reference_values(name, inputs, reference, model):
    architecture, network = model
    logits = network(**inputs[name]).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    following = inputs[name]["input_ids"][0, 1:]
    has_logit = following < logits.shape[1]
    found = logprobs[:-1].gather(1, following.where(has_logit, 0)[:, None])[:, 0]
    expected = reference[f"{name}.{architecture}.token_logprobs"]
    torch.testing.assert_close(found.where(has_logit, 0), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        logprobs[-1], reference[f"{name}.{architecture}.last_logprobs"], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_greedy_text_is_the_reference_text(name, inputs, model):
    architecture, network = model
    expected = CASES[name][f"{architecture}.greedy"]
    ids = network.generate(**inputs[name], do_sample=False, max_new_tokens=len(expected))
    assert ids[0, inputs[name]["input_ids"].shape[1] :].tolist() == expected


@torch.no_grad()
def test_the_comparison_can_fail(inputs, reference, model):
    """The mask is what stock vLLM computes otherwise: without it the values are far off."""
    architecture, network = model
    network.config.bidirectional = "none"
    logits = network(**inputs["two_images"]).logits[0, -1]
    network.config.bidirectional = "all"
    expected = reference[f"two_images.{architecture}.last_logprobs"]
    assert (torch.log_softmax(logits, dim=-1) - expected).abs().max() > 0.05
