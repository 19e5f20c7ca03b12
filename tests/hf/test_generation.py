"""Generation: cache against plain forward, ragged batches, what is refused."""

from __future__ import annotations

import pytest
import torch

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from tests.support.reference_values import (
    ARCHITECTURES,
    CASES,
    inputs_of,
    media_of,
    reference_config,
    reference_model,
    reference_processor,
    reference_weights,
)

PROCESSOR = reference_processor()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Molmo2ForConditionalGeneration:
    return reference_model(request.param)


@torch.no_grad()
def test_the_cache_changes_nothing(model):
    inputs = inputs_of("image_300x200", PROCESSOR)
    n_prompt = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    whole = {**inputs, "input_ids": generated, "attention_mask": torch.ones_like(generated)}
    del whole["token_type_ids"]
    best = model(**whole).logits[0, n_prompt - 1 : -1].argmax(-1)
    assert generated[0, n_prompt:].tolist() == best.tolist()


@torch.no_grad()
def test_a_ragged_batch_answers_as_each_text_alone(model):
    names = ("two_images", "image_57x43")
    images = [image for name in names for image in media_of(name)["images"]]
    batch = PROCESSOR(
        text=[*(CASES[name]["text"] for name in names), CASES["text_only"]["text"]],
        images=images,
        return_tensors="pt",
    )
    singles = [inputs_of(name, PROCESSOR) for name in (*names, "text_only")]
    together = model(**batch).logits[:, -1]
    for row, single in zip(together, singles, strict=True):
        torch.testing.assert_close(row, model(**single).logits[0, -1], atol=1e-4, rtol=0)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=6)
    n_prompt = batch["input_ids"].shape[1]
    for row, single in zip(ids, singles, strict=True):
        alone = model.generate(**single, do_sample=False, max_new_tokens=6)
        assert row[n_prompt:].tolist() == alone[0, single["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_leaving_token_types_out_changes_nothing(model):
    inputs = inputs_of("two_images", PROCESSOR)
    with_types = model(**inputs).logits
    del inputs["token_type_ids"]
    assert torch.equal(model(**inputs).logits, with_types)


def test_several_answers_of_one_prompt_with_media_are_refused(model):
    with pytest.raises(ValueError, match="2 answers or beams"):
        model.generate(
            **inputs_of("image_57x43", PROCESSOR), do_sample=True, num_return_sequences=2
        )
    text = inputs_of("text_only", PROCESSOR)
    ids = model.generate(**text, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    assert ids.shape[0] == 2


def test_wrong_inputs_are_refused(model):
    inputs = inputs_of("image_57x43", PROCESSOR)
    with pytest.raises(TypeError, match="pixels"):
        model(input_ids=inputs["input_ids"], pixels=1)
    fewer = inputs["input_ids"].clone()
    fewer[0, 5] = 10  # one <im_patch> less than features
    with pytest.raises(ValueError, match="392 image features for 391"):
        model(**{**inputs, "input_ids": fewer})
    with pytest.raises(ValueError, match="one kind at a time"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])


def test_loss_is_the_mean_cross_entropy_of_the_labels(model):
    inputs = inputs_of("text_only", PROCESSOR)
    labels = inputs["input_ids"].clone()
    labels[:, :10] = -100
    output = model(**inputs, labels=labels)
    logprobs = torch.log_softmax(output.logits[0, 9:-1], dim=-1)
    expected = -logprobs.gather(1, labels[0, 10:, None]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_tied_folder_without_head_gets_the_embedding(tmp_path):
    config = reference_config("qwen3")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = Molmo2ForConditionalGeneration(config)
    weights = reference_weights(tied, "qwen3")
    weights["lm_head.weight"] = weights["model.transformer.wte.embedding"]
    tied.load_state_dict(weights)
    tied.save_pretrained(tmp_path)
    loaded = Molmo2ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, weights["model.transformer.wte.embedding"])
