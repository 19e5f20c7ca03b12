"""A tree computes what its branches compute as separate conversations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from molmo_core.images import ImageGeometry
from molmo_core.prompts import Turn
from molmo_core.videos import VideoGeometry
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration, attention_mask
from molmo_training.data.example import Branch, Example, Tokenized
from molmo_training.data.tokenize import Tokenizing
from molmo_training.pixels import normalised
from tests.support.reference_values import reference_model, reference_tokenizer

BRANCHES = tuple(
    Branch(turns=(Turn(role="user", text=question), Turn(role="assistant", text=answer)))
    for question, answer in (("Point to stars.", "There are none."), ("How many?", "12"))
)


@torch.inference_mode()
def losses(model: Molmo2ForConditionalGeneration, row: Tokenized) -> list[float]:
    """Cross-entropy of each learnt token, branch after branch."""
    ids = torch.from_numpy(row.input_ids)[None]
    backbone = model.model.vision_backbone
    crops = normalised(torch.from_numpy(row.crops))
    features = backbone.pool(backbone.encode(crops), torch.from_numpy(row.pooling))
    visual = torch.isin(ids, torch.tensor(model.config.visual_token_ids))
    subsegments = torch.from_numpy(row.subsegments)[None]
    mask = attention_mask(torch.ones_like(ids, dtype=torch.bool), visual, subsegments)
    x = model.model.embed(ids, features)
    hidden = model.model.transformer(x, torch.from_numpy(row.position_ids)[None], mask)
    learnt = torch.from_numpy(row.weights > 0)
    logits = model.lm_head(hidden[0, learnt])
    found = F.cross_entropy(logits, torch.from_numpy(row.targets)[learnt], reduction="none")
    values: list[float] = found.tolist()
    return values


def test_branches_do_not_see_each_other() -> None:
    tokenizer = reference_tokenizer()
    tokenizing = Tokenizing(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        images=ImageGeometry(max_crops=1),
        videos=VideoGeometry(),
    )
    model = reference_model("qwen3")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    example = Example(images=[pixels], branches=BRANCHES)
    together = losses(model, tokenizing(example))
    apart = [
        loss
        for branch in BRANCHES
        for loss in losses(model, tokenizing(replace(example, branches=(branch,))))
    ]
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert len(set(together)) == len(together)
