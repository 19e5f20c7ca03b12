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
    region_digest,
    region_end,
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


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    prompt=prompts.filter(any),
    tail=st.integers(0, 5),
    before=st.integers(0, 9),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_the_rest_of_a_region_behind_a_cache_hit(prompt, tail, before, seed, data):
    """The step holds `before` rows of another request, then the prompt from the hit on."""
    end = len(prompt) - prompt[::-1].index(True)
    n_cached = data.draw(st.integers(0, end - 1))
    visual = torch.tensor(prompt + [False] * tail)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(visual), 4, 32, generator=generator)
    key, value = torch.randn(2, len(visual), 2, 32, generator=generator)

    def step(rows):
        return torch.cat([torch.full_like(rows[:1], 9.0).expand(before, -1, -1), rows[n_cached:]])

    output = torch.full_like(step(query), 7.0)
    begins = [0, before, before + len(visual) - n_cached]
    (rows,) = plan_rows({1: visual_ranges(prompt)}, begins, [50, n_cached])
    cached = (key[:n_cached], value[:n_cached]) if n_cached else None
    attend_visual_rows(
        rows, step(query), step(key), step(value), output, scale=32**-0.5, cached=cached
    )

    expected = step(masked_attention(query, key, value, visual, 32**-0.5))
    is_ours = torch.cat([torch.zeros(before, dtype=torch.bool), visual[n_cached:]])
    torch.testing.assert_close(output[is_ours], expected[is_ours], atol=2e-6, rtol=1e-5)
    assert torch.all(output[~is_ours] == 7.0)
    assert rows.n_cached == n_cached
    assert rows.request == 1


def test_neighbouring_and_overlapping_ranges_are_one_run():
    assert merge_runs([(5, 9), (1, 3), (4, 4), (20, 21), (8, 12)]) == [(1, 13), (20, 22)]


def test_text_between_runs_comes_last_and_is_seen_only_by_later_runs():
    order, n_visible = order_keys([(2, 4), (5, 7), (9, 10)])
    assert order == [0, 1, 2, 3, 5, 6, 9, 4, 7, 8]
    assert n_visible == [7, 8, 10]


def test_decode_and_text_tail_steps_plan_nothing():
    ranges = {0: [(1, 9)], 1: [(1, 9)], 2: []}
    assert plan_rows(ranges, [0, 1, 31, 35], [50, 10, 0]) == []


@pytest.mark.parametrize(("n_computed", "n_query"), [(0, 9), (1, 8), (5, 1)])
def test_a_step_that_ends_inside_a_region_is_an_error_and_never_a_wrong_answer(n_computed, n_query):
    with pytest.raises(RuntimeError, match="a step must reach its end"):
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


def test_digest_depends_on_every_item_its_place_and_the_text_between():
    a, b = Item("a", Position(1, 10)), Item("b", Position(14, 6))
    text = list(range(30))
    digests = {
        region_digest(items, ids)
        for items, ids in (
            ([a], text),
            ([a, b], text),
            ([b, a], text),
            ([a, Item("b", Position(15, 6))], text),
            ([a, Item("c", Position(14, 6))], text),
            ([a, b], [*text[:12], 99, *text[13:]]),
        )
    }
    assert len(digests) == 6


def test_digest_does_not_depend_on_the_question_behind():
    items = [Item("a", Position(1, 10)), Item("b", Position(14, 6))]
    assert region_digest(items, [*range(20), 5, 6]) == region_digest(items, [*range(20), 7])
