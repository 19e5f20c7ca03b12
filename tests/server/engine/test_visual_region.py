"""Visual rows: the prefix trick equals dense attention under the mask written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_server.engine.visual_region import (
    attend_visual_rows,
    merge_runs,
    order_keys,
    plan_rows,
    region_end,
    visual_set_digest,
)


def masked_attention(query, key, value, visual, scale):
    """(tokens, heads, size) under `k <= q or both visual`, written without tricks."""
    n = query.shape[0]
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, dim=1)) * scale
    position = torch.arange(n)
    seen = (position[None] <= position[:, None]) | (visual[:, None] & visual[None])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, dim=1))


def visual_ranges(visual: list[bool]) -> list[tuple[int, int]]:
    """One inclusive range for each visual token: `merge_runs` has to join them."""
    return [(k, k) for k, is_visual in enumerate(visual) if is_visual]


prompts = st.lists(st.booleans(), min_size=1, max_size=40)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    batch=st.lists(prompts, min_size=1, max_size=3),
    heads=st.sampled_from([(4, 2, 32), (4, 4, 64), (6, 2, 128), (2, 1, 32)]),
    seed=st.integers(0, 2**16),
)
def test_rows_equal_dense_attention_for_every_request_of_a_batch(batch, heads, seed):
    n_heads, n_kv_heads, size = heads
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(len, batch))
    query = torch.randn(total, n_heads, size, generator=generator)
    key, value = torch.randn(2, total, n_kv_heads, size, generator=generator)
    begins = [sum(map(len, batch[:k])) for k in range(len(batch) + 1)]
    ranges = {k: visual_ranges(p) for k, p in enumerate(batch)}
    output = torch.full_like(query, 7.0)

    for rows in plan_rows(ranges, begins, [0] * len(batch)):
        attend_visual_rows(rows, query, key, value, output, scale=size**-0.5)

    for prompt, begin, end in zip(batch, begins, begins[1:], strict=False):
        visual, at = torch.tensor(prompt), slice(begin, end)
        expected = masked_attention(query[at], key[at], value[at], visual, size**-0.5)
        torch.testing.assert_close(output[at][visual], expected[visual], atol=2e-6, rtol=1e-5)
        assert torch.all(output[at][~visual] == 7.0), "text rows are the stock kernel's"


def test_neighbouring_and_overlapping_ranges_are_one_run():
    assert merge_runs([(5, 9), (1, 3), (4, 4), (20, 21), (8, 12)]) == [(1, 13), (20, 22)]


def test_text_between_runs_comes_last_and_is_seen_only_by_later_runs():
    order, n_visible = order_keys([(2, 4), (5, 7), (9, 10)])
    assert order == [0, 1, 2, 3, 5, 6, 9, 4, 7, 8]
    assert n_visible == [7, 8, 10]


def test_decode_and_text_tail_steps_plan_nothing():
    ranges = {0: [(1, 9)], 1: [(1, 9)], 2: []}
    assert plan_rows(ranges, [0, 1, 31, 35], [50, 10, 0]) == []


@pytest.mark.parametrize(("n_computed", "n_query"), [(0, 9), (1, 40), (5, 40)])
def test_a_split_region_is_an_error_and_never_a_wrong_answer(n_computed, n_query):
    with pytest.raises(RuntimeError, match="must be computed in one step"):
        plan_rows({0: [(1, 9)]}, [0, n_query], [n_computed])


@dataclass
class Position:
    offset: int
    length: int

    def extract_embeds_range(self):
        return [(self.offset, self.offset + self.length - 1)]


@dataclass
class Item:
    identifier: str
    mm_position: Position


def test_region_ends_behind_the_last_visual_token():
    assert region_end([]) == 0
    assert region_end([Item("a", Position(1, 10)), Item("b", Position(14, 6))]) == 20


def test_digest_depends_on_every_item_its_place_and_their_order():
    a, b = Item("a", Position(1, 10)), Item("b", Position(14, 6))
    digests = {
        visual_set_digest(items)
        for items in (
            [a],
            [a, b],
            [b, a],
            [a, Item("b", Position(15, 6))],
            [a, Item("c", Position(14, 6))],
        )
    }
    assert len(digests) == 5
    assert visual_set_digest([a, b]) == visual_set_digest([a, b])
