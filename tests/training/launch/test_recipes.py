"""The released stages: their settings as the spec lists them, their mixtures by share."""

from __future__ import annotations

import pytest

from molmo_training.commands import RECIPES, configured
from molmo_training.data.formatting.formatter import UNCHANGED, LossWeight
from molmo_training.data.mixture import Group, Part, effective_shares
from molmo_training.recipes import mixtures
from molmo_training.recipes.long_context import long_context
from molmo_training.recipes.pretrain import pretrain
from molmo_training.recipes.sft import sft
from molmo_training.train_config import TrainConfig


def names(group: Group) -> list[str]:
    return [n for p in group.parts for n in (names(p) if isinstance(p, Group) else [p.dataset])]


def share_of(config: TrainConfig, group: Group, sizes: dict[str, int]) -> float:
    shares = {s.dataset: s.share for s in effective_shares(config.data.mixture, sizes)}
    return sum(shares[name] for name in names(group))


@pytest.mark.parametrize(
    ("config", "n_steps", "n_tokens", "n_crops", "rates", "warm_ups", "dropouts"),
    [
        (pretrain(), 31_000, 2536, 16, (2e-5, 2e-4, 6e-6), (2000, 200, 2000), (0.0, 0.1)),
        (sft(), 30_000, 16_384, 128, (1e-5, 5e-6, 5e-6), (200, 200, 200), (0.1, 0.0)),
        (long_context(), 2000, 36_864, 384, (1e-5, 5e-6, 5e-6), (200, 200, 200), (0.1, 0.0)),
    ],
    ids=lambda value: value.recipe if isinstance(value, TrainConfig) else "",
)
def test_the_stages_have_the_released_settings(
    config: TrainConfig,
    n_steps: int,
    n_tokens: int,
    n_crops: int,
    rates: tuple[float, ...],
    warm_ups: tuple[int, ...],
    dropouts: tuple[float, float],
) -> None:
    data, optim = config.data, config.optim
    assert (config.n_steps, data.packs_per_step) == (n_steps, 128)
    assert (data.budgets.n_tokens, data.budgets.n_crops) == (n_tokens, n_crops)
    assert data.media.max_frames == n_crops
    groups = (optim.llm, optim.connector, optim.vit)
    assert tuple(group.lr for group in groups) == rates
    assert tuple(group.warmup_steps for group in groups) == warm_ups
    assert {group.max_grad_norm for group in groups} == {1.0}
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.95), 1e-6, 0.0)
    assert optim.final_fraction == 0.1
    assert (config.model.residual_dropout, config.model.response_dropout) == dropouts
    assert (config.model.bidirectional, config.loss.z_weight) == ("all", 1e-4)
    assert config.model.trained.ft_embedding == "lm_head"
    assert data.weighting.root_subsegments
    assert data.weighting.root_length == (config.recipe != "pretrain")


def test_shares_of_the_groups() -> None:
    config = sft()
    sizes = {name: 1000 + 37 * k for k, name in enumerate(names(config.data.mixture))}
    wanted = {
        "demo": 0.15,
        "video_academic": 0.2,
        "image_academic": 0.25,
        "tracking": 0.15,
        "video_pointing": 0.15,
        "image_pointing": 0.1,
        "nlp": 0.0995,
        "hardcodes": 0.0005,
    }
    groups = {part.name: part for part in config.data.mixture.parts if isinstance(part, Group)}
    assert set(groups) == set(wanted)
    for name, rate in wanted.items():
        assert share_of(config, groups[name], sizes) == pytest.approx(rate / 1.1), name
    tracking = {p.name: p for p in groups["tracking"].parts if isinstance(p, Group)}
    for name, rate in {"track": 0.4, "ground_dist_tail": 0.01, "sot_from_bbox": 0.2}.items():
        found = share_of(config, tracking[name], sizes)
        assert found == pytest.approx(0.15 / 1.1 * rate / 1.11), name
    shares = {s.dataset: s.share for s in effective_shares(config.data.mixture, sizes)}
    pointed = 0.15 / 1.1
    assert shares["vixmo_points_minmax_0_5"] == pytest.approx(pointed * 0.4)
    demo = {p.dataset: p for p in groups["demo"].parts if isinstance(p, Part)}
    assert demo["pixmo_cap"].as_size == 100_000
    assert demo["vixmo3_top_level_captions_min_3"].weight == 1.5
    assert len(names(groups["image_academic"])) == 32
    assert len(names(groups["video_academic"])) == 34


def test_pointing_counts_less_and_is_not_divided() -> None:
    special = {name: s for s in sft().data.settings_of for name in s.datasets}
    for name in ("mevis_track", "tnllt_single_point_track", "vixmo_points_minmax_6_25"):
        assert (special[name].loss.factor, special[name].p_high_res) == (0.2, 0.0), name
        assert special[name].loss.root_subsegments is False
        assert special[name].loss.root_length is False
    assert special["vixmo3_top_level_captions_min_3"].loss.factor == 0.1
    assert (special["cosyn_point"].loss.factor, special["cosyn_point"].p_high_res) == (0.2, 0.3)
    assert "tulu4" not in special
    assert "pixmo_cap" not in special


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete(name: str, tmp_path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    own = (tmp_path / "own.jsonl",) if name.startswith("finetune") else ()
    config = configured(name, init=tmp_path, data=own)
    assert config.recipe == name
    assert config.document()["model"]["start"] == str(tmp_path)


def test_a_group_that_is_only_cut_finer_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    finer = {"fine": {"rate": 1.0, "datasets": ["a"], "p_high_res": 0.3}}
    plain = {"light": {"rate": 1.0, "datasets": ["b"], "loss": 0.2}}
    monkeypatch.setattr(mixtures.tomllib, "loads", lambda _: {"one": {**finer, **plain}})
    _, (fine, light) = mixtures.mixture("one")
    assert (fine.p_high_res, fine.loss) == (0.3, UNCHANGED)
    assert light.loss == LossWeight(factor=0.2, root_subsegments=False, root_length=False)
