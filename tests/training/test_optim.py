"""Losses, parameter groups, schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from molmo_core.errors import TrainingError
from molmo_hf.modeling_molmo2 import attention_mask
from molmo_training.optim import (
    GroupConfig,
    OptimConfig,
    Optimizer,
    group_of,
    is_layer_matrix,
    rate_at,
)
from molmo_training.recipes.object_lessons import AttentionGuide, ObjectProbe
from molmo_training.recipes.tiny import build_model


def test_probe_learns_to_read_planted_features() -> None:
    torch.manual_seed(0)
    probe = ObjectProbe(8, n_shapes=2, n_colours=2, place_columns=(3, 4))
    features = torch.randn(4, 9, 8)
    targets = torch.zeros(4, 9, 8)
    targets[..., 0] = (features[..., 0] > 0.5).float()
    targets[..., 1] = (features[..., 1] > 0).float()
    targets[..., 3:5] = features[..., 2:4]
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        loss = probe(features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_probe_without_objects_is_finite() -> None:
    loss = ObjectProbe(8, 2, 2, place_columns=(6, 7))(torch.randn(1, 9, 8), torch.zeros(1, 9, 8))
    assert torch.isfinite(loss)


def test_every_parameter_is_in_the_right_group() -> None:
    model = build_model(0)
    optimizer = Optimizer(model.named_parameters(), OptimConfig(muon=True, weight_decay=0.1))
    assert set(optimizer.groups) == {"llm", "connector", "vit"}
    stepped = [p for gs in optimizer.groups.values() for g in gs for p in g["params"]]
    assert len({id(p) for p in stepped}) == len(stepped) == len(list(model.parameters()))
    assert group_of("model.vision_backbone.image_vit.patch_embedding.weight") == "vit"
    assert group_of("model.vision_backbone.image_projector.w1.weight") == "connector"
    assert group_of("model.transformer.blocks.0.mlp.ff_out.weight") == "llm"


def test_muon_is_for_the_matrices_of_layers() -> None:
    chosen = {n for n, p in build_model(0).named_parameters() if is_layer_matrix(n, p)}
    assert "model.transformer.blocks.5.mlp.ff_out.weight" in chosen
    assert "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq.weight" in chosen
    assert "model.vision_backbone.image_projector.w3.weight" in chosen
    assert len(chosen) == 6 * 4 + 4 * 6 + 4 + 3  # decoder, tower, pooling, projector
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(8, 4)])})
    weight = model["blocks"][0].weight
    before = weight.detach().clone()
    config = OptimConfig(llm=GroupConfig(lr=0.1), muon=True)
    optimizer = Optimizer(model.named_parameters(), config)
    (weight * torch.arange(32.0).view(4, 8)).sum().backward()
    optimizer.step()
    singular = torch.linalg.svdvals((weight.detach() - before) / (0.1 * 0.2 * 8**0.5))
    # The gradient has rank 2; Newton-Schulz brings its singular values near 1.
    assert singular[:2].tolist() == pytest.approx([1, 1], abs=0.4)


def test_rates_by_hand() -> None:
    """Linear from 0 to the peak at t = 10, then half a cosine to a tenth of it at t = 110."""
    config = GroupConfig(lr=2.0, warmup_steps=10)
    wanted = {1: 0.2, 9: 1.8, 10: 2.0, 35: 2 * (0.1 + 0.45 * (1 + math.sqrt(0.5))), 60: 1.1}
    for t, rate in (wanted | {110: 0.2, 200: 0.2}).items():
        assert rate_at(config, t, 110, final=0.1, time_used=0.0) == pytest.approx(rate), t
    assert rate_at(config, 20, 110, final=0.1, time_used=0.5) == pytest.approx(1.1)
    assert rate_at(config, 5, 110, final=0.1, time_used=0.9) == pytest.approx(1.0)
    assert rate_at(config, 5, 5, final=0.1, time_used=0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("muon", [False, True])
def test_every_group_has_a_rate_and_a_warm_up_of_its_own(muon: bool) -> None:
    config = OptimConfig(
        llm=GroupConfig(lr=2.0, warmup_steps=10),
        connector=GroupConfig(lr=1.0, warmup_steps=4),
        vit=GroupConfig(lr=0.5, warmup_steps=0),
        muon=muon,
    )
    optimizer = Optimizer(build_model(0).named_parameters(), config)
    rates = optimizer.set_rates(4, 1004)
    assert rates == pytest.approx({"llm": 0.8, "connector": 1.0, "vit": 0.5}, rel=1e-4)
    for name, groups in optimizer.groups.items():
        assert [group["lr"] for group in groups] == [rates[name]] * (1 + muon), name


def test_decay_is_not_for_tables_norms_and_ends() -> None:
    named = dict(build_model(0).named_parameters())
    names = {id(p): n for n, p in named.items()}
    groups = Optimizer(named.items(), OptimConfig(weight_decay=0.1)).groups
    decayed = {
        names[id(p)]: group["weight_decay"] > 0
        for found in groups.values()
        for group in found
        for p in group["params"]
    }
    assert len(decayed) == len(named)
    assert decayed["model.transformer.blocks.0.mlp.ff_out.weight"]
    assert decayed["lm_head.weight"]
    for name in ("wte.embedding", "wte.new_embedding", "ln_f.weight", "blocks.0.attn_norm.weight"):
        assert not decayed[f"model.transformer.{name}"], name
    assert not decayed["model.vision_backbone.image_vit.positional_embedding"]
    assert not decayed["model.vision_backbone.image_vit.patch_embedding.weight"]


def test_clipping_is_by_group() -> None:
    model = torch.nn.ModuleDict({"image_vit": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    config = OptimConfig(vit=GroupConfig(lr=0.1, max_grad_norm=2.0))
    optimizer = Optimizer(model.named_parameters(), config)
    tower, head = model["image_vit"], model["head"]
    loss = 30.0 * (tower.weight.sum() + tower.bias.sum()) + 0.1 * head.weight.sum()
    (loss + 0.0 * head.bias.sum()).backward()
    norms = optimizer.step()
    assert norms["vit"] == pytest.approx(30 * math.sqrt(2), rel=1e-5)
    assert norms["llm"] == pytest.approx(0.1)
    assert norms["total"] == pytest.approx(math.hypot(30 * math.sqrt(2), 0.1))
    assert head.weight.grad is not None
    assert head.weight.grad.item() == pytest.approx(0.1)
    assert tower.weight.grad is not None
    assert tower.weight.grad.item() == pytest.approx(2 / math.sqrt(2), rel=1e-3)


def test_gradients_that_are_no_numbers_change_nothing() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = Optimizer(layer.named_parameters(), OptimConfig())
    before = layer.weight.detach().clone()
    (layer.weight * float("nan")).sum().backward()
    with pytest.raises(TrainingError, match="the gradients of llm are not finite: lower the rates"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(TrainingError, match="no parameter is trained"):
        Optimizer(torch.nn.Linear(2, 2).requires_grad_(False).named_parameters(), OptimConfig())


def test_state_goes_on_in_another_optimizer() -> None:
    torch.manual_seed(0)
    models = [build_model(0), build_model(0)]
    config = OptimConfig(muon=True)
    first, second = (Optimizer(m.named_parameters(), config) for m in models)
    ids = torch.tensor([[5, 6, 7, 8]])
    for model, optimizer in zip(models, (first, second), strict=True):
        model(input_ids=ids).logits.square().sum().backward()
        optimizer.step()
    fresh = Optimizer(models[1].named_parameters(), config)
    for part, before in zip(fresh.parts, first.parts, strict=True):
        part.load_state_dict(copy.deepcopy(before.state_dict()))
    assert fresh.set_rates(2, 9) == first.set_rates(2, 9)
    for model, optimizer in zip(models, (first, fresh), strict=True):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().sum().backward()
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_guide_is_the_attention_that_the_right_token_does_not_get() -> None:
    model = build_model(0)
    attention = model.model.transformer.blocks[2].self_attn
    guide = AttentionGuide(attention, 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    position_ids = torch.arange(4)[None]
    model.model.transformer(model.model.embed(ids, None), position_ids, attention_mask(valid))
    with torch.no_grad():
        attention.q_norm.weight.zero_()  # every key gets the same attention
    about, shows = torch.tensor([[0, 0, 0, 2]]), torch.tensor([[2, 0, 1, 0]])
    assert guide(about, shows).item() == pytest.approx(math.log(4), abs=1e-5)
    model.model.transformer(model.model.embed(ids, None), position_ids, attention_mask(valid))
    assert guide(about * 0, shows).item() == 0


def test_the_guide_has_a_gradient_also_where_nothing_is_known() -> None:
    model = build_model(0)
    guide = AttentionGuide(model.model.transformer.blocks[2].self_attn, 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = attention_mask(torch.ones(1, 4, dtype=torch.bool))
    model.model.transformer(model.model.embed(ids, None), torch.arange(4)[None], mask)
    guide(torch.tensor([[0, 0, 0, 2]]), torch.tensor([[2, 0, 1, 0]])).backward()
    gradient = model.model.transformer.blocks[2].self_attn.att_proj.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
