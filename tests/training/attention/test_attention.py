"""Attention by tiles is attention with the mask; the mask is the rule, pair by pair."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molmo_hf.modeling_molmo2 import Tokens, attention_mask
from molmo_training.attention.blocks import BlockAttend, Meeting, attend
from molmo_training.attention.flex import FlexAttend
from molmo_training.attention.tiles import runs, tile_map, tokens_of

Row = tuple[list[bool], list[int]]  # which tokens are visual, their subsegments


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two packed rows: valid, visual, subsegments, (2, S) each."""
    packs = [draw(packed_rows()) for _ in range(2)]
    length = max(len(visual) for visual, _ in packs)
    valid, seen = torch.zeros(2, 2, length, dtype=torch.bool)
    subsegments = torch.zeros(2, length, dtype=torch.long)
    for row, (visual, numbers) in enumerate(packs):
        valid[row, : len(visual)] = True
        seen[row, : len(visual)] = torch.tensor(visual)
        subsegments[row, : len(visual)] = torch.tensor(numbers)
    return valid, seen, subsegments


@st.composite
def packed_rows(draw: st.DrawFn) -> Row:
    """Examples behind each other: a prefix with visual tokens among others, then branches."""
    visual: list[bool] = []
    subsegments: list[int] = []
    for example in range(draw(st.integers(1, 4))):
        prefix = draw(st.lists(st.booleans(), min_size=1, max_size=70))
        branches = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
        visual += prefix + [False] * sum(branches)
        subsegments += [example * 100_000 + 10_000] * len(prefix)
        for number, size in enumerate(branches):
            subsegments += [example * 100_000 + number] * size
    return visual, subsegments


def all_tokens(valid: Tensor, visual: Tensor, subsegments: Tensor) -> Tokens:
    return tokens_of(valid, visual, subsegments, torch.arange(valid.shape[1]))


@given(rows())
@settings(derandomize=True, deadline=None, max_examples=10)
def test_the_mask_is_the_rule_of_training(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    valid, visual, subsegments = (t[1].tolist() for t in drawn)
    mask = attention_mask(*drawn)[1, 0].tolist()
    for q in range(len(valid)):
        for k in range(len(valid)):
            same_example = subsegments[q] // 100_000 == subsegments[k] // 100_000
            is_open = k <= q or (visual[q] and visual[k] and same_example)
            allowed = valid[k] and is_open and subsegments[q] <= subsegments[k]
            assert mask[q][k] == (allowed or not valid[q]), (q, k)


@given(rows(), st.integers(1, 20))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_no_pair_that_is_seen_is_in_a_tile_that_is_not(
    drawn: tuple[Tensor, Tensor, Tensor], size: int
) -> None:
    tokens = all_tokens(*drawn)
    seen = tile_map(tokens, tokens, size)
    mask = attention_mask(*drawn)[:, 0]
    of_tokens = mask & drawn[0][:, :, None]  # what padding sees is of no account
    length = mask.shape[1]
    for row in range(2):
        listed = torch.zeros(length, length, dtype=torch.bool)
        for tile, keys in enumerate(runs(seen, row, size, length, 3 * size)):
            for run in keys:
                part = (slice(tile * size, (tile + 1) * size), slice(run.start, run.end))
                listed[part] = True
                assert run.end - run.start <= 3 * size
                assert not run.is_whole or mask[row][part].all()
        assert not (of_tokens[row] & ~listed).any()


@given(rows(), st.sampled_from([(4, 4), (6, 2), (4, 1)]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_blocks_give_the_values_and_gradients_of_the_mask(
    drawn: tuple[Tensor, Tensor, Tensor], heads: tuple[int, int]
) -> None:
    mask = attention_mask(*drawn)
    q, k, v, cotangent = inputs(drawn[0], *heads)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = BlockAttend(all_tokens(*drawn))(q, k, v)
    valid = drawn[0][:, None, :, None]
    torch.testing.assert_close(found * valid, expected * valid, atol=1e-5, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad((found * cotangent).sum(), (q, k, v)),
        torch.autograd.grad((expected * cotangent).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def inputs(valid: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and the gradient of the output, 0 for padding."""
    generator = torch.Generator().manual_seed(valid.shape[1])
    q, k, v, cotangent = (
        torch.randn(2, n, valid.shape[1], 8, generator=generator)
        for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    return q, k, v, cotangent * valid[:, None, :, None]


@given(rows())
@settings(derandomize=True, deadline=None, max_examples=5)
def test_flex_gives_the_values_of_the_mask(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _ = inputs(drawn[0], 4, 2)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask(*drawn), enable_gqa=True
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = FlexAttend(all_tokens(*drawn))(q.detach(), k.detach(), v.detach())
    valid = drawn[0][:, None, :, None]
    torch.testing.assert_close(found * valid, expected * valid, atol=1e-5, rtol=0)


def test_queries_that_see_no_key_leave_a_sum_that_counts_for_nothing() -> None:
    n_tokens = 5
    nobody = torch.zeros(1, n_tokens, dtype=torch.bool)
    numbers = torch.zeros(1, n_tokens, dtype=torch.long)
    early = tokens_of(~nobody, nobody, numbers, torch.arange(n_tokens))
    late = Tokens(early.place + n_tokens, *early[1:])
    q, k, v, _ = inputs(torch.ones(2, n_tokens, dtype=torch.bool), 2, 2)
    meeting = Meeting.of(early, late)
    assert not meeting.is_any
    out, sums = attend(q[:1], k[:1], v[:1], meeting)
    assert torch.isfinite(out).all()
    assert (sums < -1e29).all()
