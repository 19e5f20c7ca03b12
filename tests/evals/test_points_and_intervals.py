"""Matching of points and confidence intervals against hand-made and textbook numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_evals.metrics.intervals import bootstrap, wilson
from molmo_evals.metrics.points import Tally, count_hits, match, total

SIZE_PX = (300, 400)  # diagonal 500, so a hit is within 25 px
places = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 400)), max_size=5)


def test_a_hit_is_within_a_twentieth_of_the_diagonal() -> None:
    assert match([(100, 100)], [(115, 120)], SIZE_PX).n_hits == 1  # 25 px away
    assert match([(100, 100)], [(115, 120.1)], SIZE_PX).n_hits == 0


def test_one_to_one() -> None:
    tally = match([(100, 100), (101, 101)], [(100, 100)], SIZE_PX)
    assert (tally.n_hits, tally.n_predicted, tally.n_true) == (1, 2, 1)
    assert (tally.precision, tally.recall) == (0.5, 1.0)
    assert tally.f1 == pytest.approx(2 / 3)


def test_most_hits_win_over_least_distance() -> None:
    # Nearest first would pair (20) with (18) and leave the other two 40 px apart.
    assert match([(0, 0), (20, 0)], [(18, 0), (40, 0)], SIZE_PX).n_hits == 2


def test_nothing_to_find() -> None:
    assert match([], [], SIZE_PX).f1 == 1.0
    assert match([(1, 1)], [], SIZE_PX).f1 == 0.0
    assert match([], [(1, 1)], SIZE_PX).f1 == 0.0


def test_counts_add_up() -> None:
    tally = total([Tally(n_hits=1, n_predicted=1, n_true=2), Tally(n_predicted=1)])
    assert tally == Tally(n_hits=1, n_predicted=2, n_true=2)


def test_a_broken_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        match([(float("nan"), 0)], [(0, 0)], SIZE_PX)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(predicted=places, true=places)
def test_matching_is_the_best_of_all(
    predicted: list[tuple[float, float]], true: list[tuple[float, float]]
) -> None:
    hits = match(predicted, true, SIZE_PX).n_hits
    near = np.array([[np.hypot(p[0] - t[0], p[1] - t[1]) <= 25 for t in true] for p in predicted])
    few, many = sorted((len(predicted), len(true)))
    if not few:
        assert hits == 0
        return
    near = near if len(predicted) == few else near.T
    best = max(
        sum(near[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(many), few)
    )
    assert hits == best
    assert match(true, predicted, SIZE_PX).n_hits == hits


def test_hits_of_a_matrix() -> None:
    assert count_hits(np.array([[0.9, 1.1], [0.2, 5.0]])) == 1
    assert count_hits(np.array([[0.9, 1.0], [0.2, 5.0]])) == 2


def test_wilson_has_the_textbook_bounds() -> None:
    assert wilson(90, 100) == pytest.approx((0.82563, 0.94477), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.2, size=400)
    low, high = bootstrap(values, lambda sums: sums / len(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert bootstrap(values, lambda sums: sums / len(values)) == (low, high)
    assert bootstrap(np.empty((0, 3)), lambda sums: sums) == (0.0, 1.0)
