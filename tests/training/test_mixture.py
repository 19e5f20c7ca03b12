"""Shares as in the reference, its random streams, and draws that follow from their number."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from molmo_core.errors import DataError
from molmo_training.data import mixture
from molmo_training.data.mixture import (
    Draw,
    DrawSequence,
    Group,
    Part,
    Share,
    effective_shares,
    epoch_order,
    item_seed,
    shares_table,
)

THREE = (Share("a", 0.6, 1.0), Share("b", 0.3, 1.0), Share("c", 0.1, 1.0))
SIZES = {"a": 100, "b": 25, "c": 4}


def shares_of(mixture: Group, sizes: dict[str, int]) -> dict[str, float]:
    return {name: share for name, share, _ in effective_shares(mixture, sizes)}


def test_random_streams_are_those_of_the_reference() -> None:
    """Golden: appendix A.6 of the specification."""
    assert epoch_order(10, 0, 50_189).tolist() == [6, 0, 5, 7, 4, 3, 1, 8, 9, 2]
    drawn = [
        np.random.RandomState(np.random.MT19937(item_seed(7, epoch))).randint(0, 1000, 5).tolist()
        for epoch in (0, 1)
    ]
    assert drawn == [[74, 811, 597, 686, 821], [518, 240, 716, 196, 104]]
    draws = DrawSequence(THREE, SIZES, 50_189)
    chosen = ["abc".index(draws(number).dataset) for number in range(20)]
    assert chosen == [2, 2, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 2, 2, 2]


def test_parts_share_by_root_of_size_cap_part_weight_or_rate() -> None:
    parts = (
        Part(dataset="plain"),
        Part(dataset="capped", as_size=400),
        Part(dataset="half", as_size=0.5),
        Part(dataset="doubled", weight=2.0),
        Part(dataset="exact", rate=3.0),
    )
    sizes = {"plain": 900, "capped": 10_000, "half": 200, "doubled": 25, "exact": 7}
    masses = {"plain": 30.0, "capped": 20.0, "half": 10.0, "doubled": 10.0, "exact": 3.0}
    expected = {name: mass / 73 for name, mass in masses.items()}
    assert shares_of(Group(name="all", parts=parts), sizes) == pytest.approx(expected)


def test_groups_nest_and_their_rates_need_not_sum_to_one() -> None:
    """The shares that the specification gives for the released SFT mixture, rates of 1.1."""
    rates = {"demo": 0.15, "video": 0.2, "image": 0.25, "track": 0.15, "vpoint": 0.15,
             "ipoint": 0.1, "nlp": 0.0995, "hardcodes": 0.0005}  # fmt: skip
    groups = [
        Group(name=name, rate=rate, parts=(Part(dataset=f"{name}_1"), Part(dataset=f"{name}_2")))
        for name, rate in rates.items()
    ]
    dense = Group(name="dense", rate=0.5, parts=(Part(dataset="demo_1"), Part(dataset="image_1")))
    sizes = {f"{name}_{k}": size for name in rates for k, size in ((1, 900), (2, 100))}
    shares = shares_of(Group(name="sft", parts=tuple(groups)), sizes)
    of_groups = {name: shares[f"{name}_1"] + shares[f"{name}_2"] for name in rates}
    rounded = {name: round(share, 3) for name, share in of_groups.items()}
    assert rounded == {"demo": 0.136, "video": 0.182, "image": 0.227, "track": 0.136,
                       "vpoint": 0.136, "ipoint": 0.091, "nlp": 0.09, "hardcodes": 0.0}  # fmt: skip
    assert shares["demo_1"] / shares["demo_2"] == pytest.approx(3)
    nested = Group(name="both", parts=(Group(name="sft", parts=tuple(groups)), dense))
    twice = shares_of(nested, sizes)
    assert sum(twice.values()) == pytest.approx(1)
    assert twice["demo_1"] == pytest.approx(shares["demo_1"] / 1.5 + 0.5 / 1.5 / 2)


def test_the_table_says_shares_and_epochs() -> None:
    group = Group(name="all", parts=(Part(dataset="a", rate=3), Part(dataset="b", rate=1)))
    lines = shares_table(group, {"a": 1000, "b": 50}, n_examples=400).splitlines()
    assert [line.split() for line in lines] == [
        ["dataset", "size", "share", "epochs"],
        ["a", "1,000", "75.000%", "0.30"],
        ["b", "50", "25.000%", "2.00"],
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((Part(dataset="pixmo_cpa"),), "no dataset pixmo_cpa; near are pixmo_cap"),
        ((Part(dataset="none"),), "dataset none is empty"),
        ((Part(dataset="pixmo_cap", rate=-1),), "at a rate of -1"),
        ((Part(dataset="pixmo_cap", weight=math.nan),), "at a rate of nan"),
        ((Part(dataset="pixmo_cap", rate=0),), "nothing of the group all is drawn"),
        ((), "nothing of the group all is drawn"),
        (
            (Part(dataset="pixmo_cap"), Part(dataset="pixmo_cap", loss_factor=0.2)),
            "loss factors 1.0 and 0.2",
        ),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(parts: tuple[Part, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        effective_shares(Group(name="all", parts=parts), {"pixmo_cap": 10, "none": 0})


def test_an_epoch_has_every_example_once() -> None:
    draws = DrawSequence(THREE, SIZES, 1)
    seen: Counter[Draw] = Counter(draws(number) for number in range(2000))
    assert max(seen.values()) == 1
    by_epoch = Counter((draw.dataset, draw.epoch) for draw in seen)
    for name, size in SIZES.items():
        last = max(epoch for dataset, epoch in by_epoch if dataset == name)
        assert all(by_epoch[name, epoch] == size for epoch in range(last))
        assert last >= 2000 * dict(a=0.5, b=0.2, c=0.05)[name] // size
    orders = {
        epoch: [d.index for d in seen if (d.dataset, d.epoch) == ("b", epoch)] for epoch in (0, 1)
    }
    assert orders[0] != orders[1]


def drawn(seed: int) -> list[Draw]:
    draws = DrawSequence(THREE, SIZES, seed)
    return [draws(number) for number in range(300)]


def test_draws_follow_from_their_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(9)
    monkeypatch.setattr(mixture, "CHUNK_SIZE", 16)
    jumping = DrawSequence(THREE, SIZES, 9)
    for number in (299, 3, 160, 161, 17, 0, 298, 64):
        assert jumping(number) == whole[number]
    assert [jumping(number) for number in range(300)] == whole
    assert drawn(10) != whole


def test_what_is_drawn_in_an_example_depends_on_run_dataset_index_and_epoch() -> None:
    draws, other = DrawSequence(THREE, SIZES, 1), DrawSequence(THREE, SIZES, 2)
    base = Draw("a", 5, 0)
    first = draws.generator(base).random()
    assert draws.generator(base).random() == first
    different = [
        draws.generator(Draw("b", 5, 0)).random(),
        draws.generator(Draw("a", 6, 0)).random(),
        draws.generator(Draw("a", 5, 1)).random(),
        other.generator(base).random(),
    ]
    assert len({first, *different}) == 5
