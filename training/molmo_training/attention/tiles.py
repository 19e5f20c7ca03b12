"""Which tiles of queries see which tiles of keys, without a value for each pair of tokens.

A tile is some tokens in a row. Bounds of a tile's places, examples and subsegments tell whether
any of its tokens can see any of another's: never wrong where they say no, and seldom yes for
nothing. The rule itself is `molmo_hf.modeling_molmo2.sees`.

Knows: tokens. Does not know: attention, devices, processes.
Shapes: B rows, S tokens, T tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from molmo_hf.modeling_molmo2 import EXAMPLE_STRIDE, Tokens

_NO_EXAMPLE = 2**30


@dataclass(frozen=True, kw_only=True)
class TileMap:
    """For each tile of queries and of keys, (B, T, T): is any pair seen, are all of them."""

    is_seen: Tensor
    is_whole: Tensor


class Run(NamedTuple):
    """Neighbouring keys [start, end) that a tile of queries sees, all of them or some."""

    start: int
    end: int
    is_whole: bool


def tokens_of(valid: Tensor, visual: Tensor, subsegments: Tensor, places: Tensor) -> Tokens:
    """The tokens (B, len(places)) at these places of rows (B, S), in this order."""
    return Tokens(
        place=places.expand(len(valid), -1),
        valid=valid[:, places],
        visual=visual[:, places],
        subsegment=subsegments[:, places],
    )


def tile_map(queries: Tokens, keys: Tokens, size: int) -> TileMap:
    """Tiles of `size` tokens; the last ones may be shorter."""
    q = _Bounds(*(bound[:, :, None] for bound in _bounds(queries, size)))
    k = _Bounds(*(bound[:, None] for bound in _bounds(keys, size)))
    is_before = k.first_place <= q.last_place
    shares_example = (q.first_example <= k.last_example) & (k.first_example <= q.last_example)
    shares_place = is_before & (q.first_place <= k.last_place)
    is_deep_enough = q.least_subsegment <= k.most_subsegment
    is_seen = k.any_valid & (is_before | shares_example) & is_deep_enough | shares_place
    all_before = k.last_place <= q.first_place
    one_example = (
        q.all_visual
        & k.all_visual
        & (q.first_example == k.last_example)
        & (q.last_example == k.first_example)
    )
    all_deep_enough = q.most_subsegment <= k.least_subsegment
    is_whole = k.all_valid & (all_before | one_example) & all_deep_enough
    return TileMap(is_seen=is_seen, is_whole=is_whole & is_seen)


class _Bounds(NamedTuple):
    """Bounds of each tile, (B, T); examples are those of its visual tokens."""

    first_place: Tensor
    last_place: Tensor
    least_subsegment: Tensor
    most_subsegment: Tensor
    first_example: Tensor
    last_example: Tensor
    any_valid: Tensor
    all_valid: Tensor
    all_visual: Tensor


def _bounds(tokens: Tokens, size: int) -> _Bounds:
    n_tokens = tokens.place.shape[1]
    n_tiles = -(-n_tokens // size)
    index = torch.arange(n_tiles * size, device=tokens.place.device).clamp(max=n_tokens - 1)
    place, valid, visual, subsegment = (t[:, index].unflatten(1, (-1, size)) for t in tokens)
    example = subsegment // EXAMPLE_STRIDE
    return _Bounds(
        first_place=place.amin(-1),
        last_place=place.amax(-1),
        least_subsegment=subsegment.amin(-1),
        most_subsegment=subsegment.amax(-1),
        first_example=torch.where(visual, example, _NO_EXAMPLE).amin(-1),
        last_example=torch.where(visual, example, -1).amax(-1),
        any_valid=valid.any(-1),
        all_valid=valid.all(-1),
        all_visual=visual.all(-1),
    )


def runs(seen: TileMap, row: int, size: int, n_keys: int, most_keys: int) -> list[list[Run]]:
    """For each tile of queries of a row the keys that it sees, at most `most_keys` at a time."""
    is_seen, is_whole = seen.is_seen[row].tolist(), seen.is_whole[row].tolist()
    most_tiles = max(most_keys // size, 1)
    return [
        [
            Run(first * size, min(end * size, n_keys), whole)
            for first, end, whole in _neighbours(tiles, wholes, most_tiles)
        ]
        for tiles, wholes in zip(is_seen, is_whole, strict=True)
    ]


def _neighbours(
    is_seen: list[bool], is_whole: list[bool], most: int
) -> Iterator[tuple[int, int, bool]]:
    """Tiles [first, end) that are seen alike."""
    first = 0
    for tile in range(1, len(is_seen) + 1):
        goes_on = (
            tile < len(is_seen)
            and is_seen[tile] == is_seen[first]
            and is_whole[tile] == is_whole[first]
            and tile - first < most
        )
        if not goes_on:
            if is_seen[first]:
                yield first, tile, is_whole[first]
            first = tile
