"""Which positions and crops of a batch each rank of a context-parallel group computes.

All ranks know the whole batch, so that each works out everybody's share alike.
Knows: places, pooling indices. Does not know: models, processes.
Shapes: B rows, S positions, R ranks, C crops, M visual tokens, K patches a token pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molmo_training.parallel.mesh import ContextKind


def places_of_ranks(length: int, n_ranks: int, kind: ContextKind) -> list[Tensor]:
    """The places of each rank, equally many; those from `length` on are padding.

    Ulysses: a chunk each, as all heads of a rank attend from all places anyway. Ring: the r-th
    chunk from either end, because later places see more: with one chunk each the last rank would
    score about twice as much as the mean, and the others would wait for it.
    """
    n_chunks = n_ranks if kind == "ulysses" else 2 * n_ranks
    size = -(-length // n_chunks)
    chunks = torch.split(torch.arange(size * n_chunks), size)
    if kind == "ulysses":
        return list(chunks)
    return [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(n_ranks)]


@dataclass(frozen=True, kw_only=True)
class VisionShare:
    """What a rank computes of the visual tokens, and where its features are needed.

    `crops` is what it encodes; `tokens` (m,) are the visual tokens that it pools, ordered by the
    ranks that hold their places. `sent`, `received`: how many features go to and come from each
    rank; `order` puts those that came in the order of this rank's places.
    """

    crops: slice
    tokens: Tensor
    sent: list[int]
    received: list[int]
    order: Tensor


def vision_share(
    pooling: Tensor,
    *,
    n_crops: int,
    n_patches: int,
    is_patch: Tensor,
    places: list[Tensor],
    rank: int,
) -> VisionShare:
    """The share of a rank.

    `pooling` (M, K) indexes the patches of all crops, `is_patch` (B, S) says where the visual
    tokens stand, S as in `places`. Crops are cut where no visual token pools from both sides, as
    evenly as that allows: any frame of a video, any picture.
    """
    n_ranks = len(places)
    bounds = crop_bounds(pooling, n_crops=n_crops, n_patches=n_patches, n_ranks=n_ranks)
    first_crop = torch.where(pooling >= 0, pooling // n_patches, n_crops).amin(-1)
    encoder = torch.bucketize(first_crop, torch.tensor(bounds[1:-1]), right=True)  # (M,)
    holder, slot = _holders(is_patch, places)
    mine = (encoder == rank).nonzero().squeeze(-1)
    tokens = mine[torch.argsort(holder[mine], stable=True)]
    coming = (holder == rank).nonzero().squeeze(-1)
    coming = coming[torch.argsort(encoder[coming], stable=True)]
    return VisionShare(
        crops=slice(bounds[rank], bounds[rank + 1]),
        tokens=tokens,
        sent=torch.bincount(holder[tokens], minlength=n_ranks).tolist(),
        received=torch.bincount(encoder[coming], minlength=n_ranks).tolist(),
        order=torch.argsort(slot[coming]),
    )


def _holders(is_patch: Tensor, places: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For each visual token the rank that holds its place, and its place among that rank's."""
    length = is_patch.shape[1]
    rank_of, slot_of = torch.empty(2, length, dtype=torch.long)
    for rank, own in enumerate(places):
        rank_of[own] = rank
        slot_of[own] = torch.arange(len(own))
    row, place = is_patch.nonzero(as_tuple=True)
    return rank_of[place], row * len(places[0]) + slot_of[place]


def crop_bounds(pooling: Tensor, *, n_crops: int, n_patches: int, n_ranks: int) -> list[int]:
    """Where each rank's crops begin, and the end: the allowed cuts that are nearest to even."""
    crop = pooling // n_patches
    first = torch.where(pooling >= 0, crop, n_crops).amin(-1)
    last = torch.where(pooling >= 0, crop, -1).amax(-1)
    # How many visual tokens pool from both sides of the cut before each crop.
    crossing = torch.zeros(n_crops + 2, dtype=torch.long)
    one = torch.ones_like(first)
    crossing.index_add_(0, first + 1, one)
    crossing.index_add_(0, last + 1, -one)
    cuts = (crossing.cumsum(0)[: n_crops + 1] == 0).nonzero().squeeze(-1)
    even = torch.arange(1, n_ranks) * n_crops / n_ranks
    nearest = (cuts[None] - even[:, None]).abs().argmin(-1)
    return [0, *cuts[nearest].tolist(), n_crops]
