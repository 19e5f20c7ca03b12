"""A step and a loader as the specification writes them for the reference. Yardsticks.

Rows and crops are padded to the most that a pack can hold, the mask is a dense table of floats, the
logits of all learnt tokens exist at once, and pictures are opened before it is known which pack
they go into. Knows: these algorithms. Does not know: what production does instead.
Source: the project's specification of Molmo2's training (loader, packing, loss, mask).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration, attention_mask
from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.lanes import Plan
from molmo_training.data.loader import collate
from molmo_training.data.packing import Budgets, pack_rows
from molmo_training.pixels import normalised
from tests.bench.plain_packing import CROP_WEIGHT, N_STEPS, plain_knapsack

Z_WEIGHT = 1e-4


def plain_batches(plan: Plan) -> Iterator[Batch]:
    """One pack after the other, each padded to the budgets."""
    budgets, buffer_size = plan.config.budgets, plan.config.buffer_size
    step = max(1, budgets.n_tokens // N_STEPS)
    capacity = (-(-budgets.n_tokens // step), budgets.n_crops)
    waiting: list[Tokenized] = []
    number = 0
    while True:
        row = plan.make(plan.draws(number)).row()
        number += 1
        if len(waiting) == buffer_size:
            sizes = [(-(-len(r.input_ids) // step), len(r.crops)) for r in waiting]
            values = [len(r.input_ids) + CROP_WEIGHT * len(r.crops) for r in waiting]
            chosen = set(plain_knapsack(sizes, values, capacity))
            pack = [waiting[k] for k in sorted(chosen)]
            waiting = [r for k, r in enumerate(waiting) if k not in chosen]
            yield padded(pack, budgets)
        waiting.append(row)


def padded(rows: list[Tokenized], budgets: Budgets) -> Batch:
    """The rows as one pack of exactly the budgets' tokens and crops, the latter as numbers."""
    batch = collate([pack_rows(rows)])
    n_tokens = budgets.n_tokens - batch.input_ids.shape[1]
    n_crops = budgets.n_crops - len(batch.crops)
    names = ("input_ids", "targets", "weights", "position_ids", "subsegments", "valid")
    wide = {name: F.pad(getattr(batch, name), (0, n_tokens)) for name in names}
    return Batch(
        **wide,
        crops=F.pad(normalised(batch.crops), (0, 0, 0, 0, 0, n_crops), value=-1),
        pooling=batch.pooling,
        patch_targets=batch.patch_targets,
        token_targets=batch.token_targets,
        about=batch.about,
        shows=batch.shows,
        n_examples=len(rows),
    )


def plain_step(
    model: Molmo2ForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: Batch
) -> float:
    """One step on one pack; returns the loss."""
    config, backbone = model.config, model.model.vision_backbone
    features = backbone.pool(backbone.encode(batch.crops), batch.pooling)
    visual = torch.isin(batch.input_ids, torch.tensor(config.visual_token_ids))
    allowed = attention_mask(batch.valid, visual, batch.subsegments)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    x = model.model.embed(batch.input_ids, features)
    hidden = model.model.transformer(x, batch.position_ids, mask)
    learnt = batch.weights > 0
    logits = model.lm_head(hidden[learnt]).float()
    weights = batch.weights[learnt]
    losses = F.cross_entropy(logits, batch.targets[learnt], reduction="none")
    z = Z_WEIGHT * logits.logsumexp(-1).square()
    loss: torch.Tensor = ((losses + z) * weights).sum() / weights.sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
