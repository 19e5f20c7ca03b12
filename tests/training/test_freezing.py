"""What is trained: patterns, the named parts of the reference, counts."""

from __future__ import annotations

import pytest
import torch

from molmo_core.errors import TrainingError
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training.freezing import (
    TrainedParts,
    count_parameters,
    freeze,
    store_frozen,
)
from molmo_training.recipes.tiny import tiny_config

EMBEDDING, NEW_ROWS = "model.transformer.wte.embedding", "model.transformer.wte.new_embedding"


@pytest.fixture
def model() -> Molmo2ForConditionalGeneration:
    torch.manual_seed(0)
    return Molmo2ForConditionalGeneration(tiny_config())


def frozen_names(model: Molmo2ForConditionalGeneration) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_pattern_freezes_what_it_matches_and_nothing_else(model):
    counts = freeze(model, ["model.transformer.blocks.0.*", "*image_vit*"])
    frozen = frozen_names(model)
    assert {n for n in frozen if "transformer.blocks." in n} == {
        n for n, _ in model.named_parameters() if "transformer.blocks.0." in n
    }
    assert {n for n, _ in model.named_parameters() if "image_vit" in n} <= frozen
    vit = next(c for c in counts if c.group == "vit")
    assert vit.n_trained == 0
    assert sum(c.n_trained + c.n_frozen for c in counts) == sum(
        p.numel() for p in model.parameters()
    )
    assert counts == count_parameters(model)


def test_a_pattern_that_matches_nothing_names_its_neighbours(model):
    with pytest.raises(
        TrainingError, match=r"no parameter .*block\.0.*'model\.transformer\.blocks"
    ):
        freeze(model, ["model.transformer.block.0.*"])
    assert frozen_names(model) == set()


@pytest.mark.parametrize(
    ("ft_embedding", "frozen"),
    [
        ("lm_head", {EMBEDDING}),
        ("ln_f", {EMBEDDING, "lm_head.weight"}),
        ("wte", {"model.transformer.ln_f.weight", "lm_head.weight"}),
        ("all", set()),
    ],
)
def test_the_decoders_ends_are_named_as_in_the_reference(model, ft_embedding, frozen):
    freeze(model, TrainedParts(ft_embedding=ft_embedding).frozen())
    assert frozen_names(model) == frozen


def test_parts_are_the_optimizers_groups_and_new_rows_belong_to_the_connector(model):
    freeze(model, TrainedParts(ft_llm=False, ft_vit=False).frozen())
    counts = {c.group: c for c in count_parameters(model)}
    assert counts["llm"].n_trained == counts["vit"].n_trained == 0
    assert counts["connector"].n_frozen == 0
    assert NEW_ROWS not in frozen_names(model)
    freeze(model, TrainedParts(ft_connector=False).frozen())
    assert sum(c.n_trained for c in count_parameters(model)) == 0


def test_a_head_that_was_the_embedding_stays_with_it(model):
    freeze(model, TrainedParts().frozen(has_tied_head=True))
    assert frozen_names(model) == {EMBEDDING, "lm_head.weight"}


def test_a_head_that_is_the_embedding_is_trained_with_it(model):
    model.lm_head.weight = model.model.transformer.wte.embedding
    freeze(model, TrainedParts(ft_embedding="wte").frozen(has_tied_head=True))
    assert frozen_names(model) == {"model.transformer.ln_f.weight"}


def test_frozen_layers_in_bfloat16_compute_the_same_under_autocast(model):
    freeze(model, ["*.blocks.*", "*image_vit*"])
    ids = torch.arange(1, 40)[None]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits
        n_saved = store_frozen(model)
        after = model(input_ids=ids).logits
    n_halved = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert n_saved == 2 * n_halved > 0
    assert torch.equal(before, after)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
