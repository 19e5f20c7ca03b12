"""Attention tile by tile, in plain torch: memory grows with the number of tokens, not its square.

A tile of queries meets only the keys that it may see, a few at a time, with a softmax that goes on
from one to the next; backward computes the scores again from the logarithm of their sums. The same
steps serve whole rows (`BlockAttend`) and rows of which others hold the keys (`parallel.ring`).

Knows: tiles, the rule `sees`. Does not know: processes, models.
Shapes: B rows, H heads, K heads of keys (a divisor of H), S queries, T keys, D width of a head.
Computes in float32 whatever comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molmo_hf.modeling_molmo2 import Tokens, sees
from molmo_training.attention.tiles import Run, runs, tile_map

TILE = 128
"""Tokens of a tile."""
_MOST_KEYS = 1024
"""Keys that are scored at a time: what is in flight stays in a core's cache."""
UNSEEN = -1e30
"""A score that leaves nothing. Not −inf: a row that sees none of some keys stays a number."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Queries (B, S) and keys (B, T) with the runs of keys of each tile of queries of each row."""

    queries: Tokens
    keys: Tokens
    runs: list[list[list[Run]]]

    @staticmethod
    def of(queries: Tokens, keys: Tokens) -> Meeting:
        seen = tile_map(queries, keys, TILE)
        n_rows, n_keys = keys.place.shape
        return Meeting(
            queries=queries,
            keys=keys,
            runs=[runs(seen, row, TILE, n_keys, _MOST_KEYS) for row in range(n_rows)],
        )

    @property
    def is_any(self) -> bool:
        """Whether any query sees any key."""
        return any(keys for tiles in self.runs for keys in tiles)

    def hidden(self, row: int, first: int, end: int, run: Run) -> Tensor | None:
        """Which of these keys which of these queries may not see; None when they see all."""
        if run.is_whole:
            return None
        query = Tokens(*(t[row, first:end, None] for t in self.queries))
        key = Tokens(*(t[row, None, run.start : run.end] for t in self.keys))
        hidden: Tensor = ~sees(query, key)
        return hidden


def attend(q: Tensor, k: Tensor, v: Tensor, meeting: Meeting) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, S, D) and logarithms of the sums of exponentials (B, H, S), in float32.

    A query that sees none of these keys has about `UNSEEN` for the latter.
    """
    out = torch.empty_like(q, dtype=torch.float32)
    sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for row, tiles in enumerate(meeting.runs):
        for tile, keys in enumerate(tiles):
            first, end = tile * TILE, min((tile + 1) * TILE, q.shape[2])
            scaled = _grouped(q[row, :, first:end], k.shape[1]) * q.shape[-1] ** -0.5
            most = scaled.new_full((*scaled.shape[:2], 1), UNSEEN)
            total, mixed = torch.zeros_like(most), torch.zeros_like(scaled)
            for run in keys:
                scores = _scores(scaled, k[row], run, meeting.hidden(row, first, end, run))
                higher = torch.maximum(most, scores.amax(-1, keepdim=True))
                shares = scores.sub_(higher).exp_()
                fade = (most - higher).exp_()
                total = total * fade + shares.sum(-1, keepdim=True)
                mixed = mixed * fade + shares @ v[row, :, run.start : run.end].float()
                most = higher
            shape = (q.shape[1], end - first)
            # Without any key the sum is 0: the output is then 0, and counts for nothing.
            known = total.clamp(min=1e-30)
            out[row, :, first:end] = (mixed / known).view(*shape, -1)
            sums[row, :, first:end] = (most + known.log()).view(shape)
    return out, sums


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, meeting: Meeting, sums: Tensor, d_out: Tensor, inner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32.

    `sums` of `attend` over all keys of the queries, of which these may be a part; `inner` (B, H, S)
    are the products of outputs with their gradients `d_out`.
    """
    scale = q.shape[-1] ** -0.5
    d_q, d_k, d_v = (torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v))
    for row, tiles in enumerate(meeting.runs):
        for tile, keys in enumerate(tiles):
            first, end = tile * TILE, min((tile + 1) * TILE, q.shape[2])
            scaled = _grouped(q[row, :, first:end], k.shape[1]) * scale
            d_mixed = _grouped(d_out[row, :, first:end], k.shape[1])
            total = sums[row, :, first:end].reshape(*scaled.shape[:2], 1)
            product = inner[row, :, first:end].reshape(*scaled.shape[:2], 1)
            d_scaled = torch.zeros_like(scaled)
            for run in keys:
                span = slice(run.start, run.end)
                scores = _scores(scaled, k[row], run, meeting.hidden(row, first, end, run))
                shares = scores.sub_(total).exp_()
                d_v[row, :, span] += shares.transpose(1, 2) @ d_mixed
                d_scores = d_mixed @ v[row, :, span].float().transpose(1, 2)
                d_scores = d_scores.sub_(product).mul_(shares)
                d_scaled += d_scores @ k[row, :, span].float()
                d_k[row, :, span] += d_scores.transpose(1, 2) @ scaled
            d_q[row, :, first:end] = (d_scaled * scale).view(q.shape[1], end - first, -1)
    return d_q, d_k, d_v


def _grouped(x: Tensor, n_kv_heads: int) -> Tensor:
    """(H, n, D) → (K, H / K · n, D): the queries that share a head of keys behind each other."""
    return x.float().reshape(n_kv_heads, -1, x.shape[-1])


def _scores(scaled: Tensor, k: Tensor, run: Run, hidden: Tensor | None) -> Tensor:
    """Scores (K, H / K · n, keys of the run) of scaled queries."""
    scores = scaled @ k[:, run.start : run.end].float().transpose(1, 2)
    if hidden is not None:
        scores.view(len(scores), -1, *hidden.shape).masked_fill_(hidden, UNSEEN)
    return scores


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meeting: Meeting) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out, sums = attend(q, k, v, meeting)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.meeting = meeting
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            inner = (d_out.float() * out.float()).sum(-1)
            d_q, d_k, d_v = attend_backward(q, k, v, ctx.meeting, sums, d_out, inner)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None


class BlockAttend:
    """Attention of rows whose queries and keys are the same tokens (B, S)."""

    def __init__(self, tokens: Tokens) -> None:
        self._meeting = Meeting.of(tokens, tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D) and twice (B, K, S, D) → (B, H, S, D)."""
        out: Tensor = _BlockAttention.apply(q, k, v, self._meeting)  # type: ignore[no-untyped-call]
        return out
