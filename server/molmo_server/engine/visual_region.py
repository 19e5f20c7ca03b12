"""The visual region of a prompt and how its rows of attention are computed exactly.

A *run* is a stretch of neighbouring visual tokens (one image, one frame); the *region* reaches
from the first run's begin to the last run's end, the text between runs (timestamps, "Image 2")
included. Under `bidirectional: all` a visual query sees every visual key of the prompt and the
text in front of itself, so for all queries of one run the visible set is the same: the text
before the region, all visual keys, and the region's text up to that run. With the region's text
moved behind the visual keys, every such set is a prefix of one key order: no mask is needed.

Knows: torch, token positions. Does not know: vLLM, backends, the KV cache.
Source: Molmo2's attention mask (`k <= q or both visual`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch.nn import functional


class _Position(Protocol):
    offset: int
    length: int

    def extract_embeds_range(self) -> list[tuple[int, int]]: ...


class _MediaItem(Protocol):
    """What is used of vLLM's MultiModalFeatureSpec."""

    identifier: str
    mm_position: _Position


Run = tuple[int, int]
"""Half-open token range [begin, end) of neighbouring visual tokens."""


def merge_runs(inclusive_ranges: Iterable[tuple[int, int]]) -> list[Run]:
    """Turn vLLM's inclusive ranges into ascending half-open runs, neighbours joined."""
    runs: list[Run] = []
    for first, last in sorted(inclusive_ranges):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], last + 1))
        else:
            runs.append((first, last + 1))
    return runs


def region_end(items: Sequence[_MediaItem]) -> int:
    """Position behind the last visual token of a prompt; 0 without media."""
    if not items:
        return 0
    return max(last + 1 for i in items for _, last in i.mm_position.extract_embeds_range())


def region_digest(items: Sequence[_MediaItem], token_ids: Sequence[int]) -> str:
    """Fingerprint of all that keys and values up to the region's end depend on.

    That is which media the prompt holds and where, and the text in front of and between them.
    """
    digest = hashlib.sha256()
    for item in items:
        position = item.mm_position
        digest.update(f"{item.identifier}@{position.offset}+{position.length};".encode())
    digest.update(array("q", token_ids[: region_end(items)]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualRows:
    """One request's visual queries of a step, and which keys they see.

    Keys are counted by their position in the prompt: those of earlier steps come from the cache,
    the others are rows of this step's batch.
    """

    request: int
    """Index in the batch, for the cache's block table."""
    n_cached: int
    """Tokens computed before this step, a prefix-cache hit that ended inside the region."""
    new_keys: Run
    """Rows of the batch that hold the keys from `n_cached` to the region's end."""
    runs: tuple[Run, ...]
    """Rows of the batch that hold visual queries."""
    key_order: torch.Tensor
    """Positions: text before the region, visual keys, the region's text."""
    n_visible: tuple[int, ...]
    """For each run: how many of `key_order`, from the front, its queries see."""


def order_keys(runs: Sequence[Run]) -> tuple[list[int], list[int]]:
    """Order the positions [0, end of the region) so that each run sees a prefix of them.

    Returns the order and, for each run, the length of the prefix.
    """
    gaps = [(end, begin) for (_, end), (begin, _) in pairwise(runs)]
    visual = [p for begin, end in runs for p in range(begin, end)]
    between = [p for begin, end in gaps for p in range(begin, end)]
    order = [*range(runs[0][0]), *visual, *between]
    n_always = runs[0][0] + len(visual)
    n_between = accumulate((end - begin for begin, end in gaps), initial=0)
    return order, [n_always + n for n in n_between]


def plan_rows(
    ranges_of_request: Mapping[int, Iterable[tuple[int, int]]],
    query_begins: Sequence[int],
    n_computed: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[VisualRows]:
    """Find the requests of a step that compute (the rest of) their visual region in it.

    `query_begins` has one entry more than there are requests; `n_computed` is each request's
    number of tokens computed before this step. Raises RuntimeError when the step ends inside a
    region: its early keys would lack what the late images add, so no step could be right.
    """
    plan = []
    for index, ranges in sorted(ranges_of_request.items()):
        runs = merge_runs(ranges)
        done = n_computed[index]
        if not runs or done >= runs[-1][1]:
            continue
        row, n_query = query_begins[index], query_begins[index + 1] - query_begins[index]
        if done + n_query < runs[-1][1]:
            raise RuntimeError(
                f"visual region [{runs[0][0]}, {runs[-1][1]}) was scheduled as tokens "
                f"[{done}, {done + n_query}), a step must reach its end: start the engine with "
                "molmo_server's scheduler"
            )
        order, n_visible = order_keys(runs)
        todo = [(run, n) for run, n in zip(runs, n_visible, strict=True) if run[1] > done]
        plan.append(
            VisualRows(
                request=index,
                n_cached=done,
                new_keys=(row, row + runs[-1][1] - done),
                runs=tuple((max(b, done) - done + row, e - done + row) for (b, e), _ in todo),
                key_order=torch.tensor(order, device=device),
                n_visible=tuple(n for _, n in todo),
            )
        )
    return plan


def attend_visual_rows(
    rows: VisualRows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    cached: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Overwrite the visual rows of `output` with attention under the bidirectional mask.

    `query` and `output` are (tokens, heads, head size), `key` and `value` (tokens, kv heads,
    head size), all rows of the step's batch; grouped queries where there are fewer kv heads.
    `cached` are keys and values of positions [0, n_cached), needed when that is not empty.
    """
    old_keys, old_values = cached or (None, None)
    keys, values = _ordered(key, rows, old_keys), _ordered(value, rows, old_values)
    for (begin, end), n_visible in zip(rows.runs, rows.n_visible, strict=True):
        attended = functional.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1).unsqueeze(0),
            keys[:, :, :n_visible],
            values[:, :, :n_visible],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[begin:end] = attended.squeeze(0).transpose(0, 1)


def _ordered(batch: torch.Tensor, rows: VisualRows, cached: torch.Tensor | None) -> torch.Tensor:
    """(1, kv heads, keys of the region, head size) in `key_order`."""
    new = batch[rows.new_keys[0] : rows.new_keys[1]]
    by_position = new if cached is None else torch.cat([cached, new])
    return by_position[rows.key_order].transpose(0, 1).unsqueeze(0)
