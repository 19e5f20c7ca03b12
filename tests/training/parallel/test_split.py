"""Every position and crop has one rank, and features arrive where they are needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.errors import TrainingError
from molmo_training.parallel.mesh import ContextKind, ParallelConfig, make_mesh
from molmo_training.parallel.split import crop_bounds, places_of_ranks, vision_share
from molmo_training.parallel.ulysses import check_heads

N_PATCHES = 4


@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from(["ulysses", "ring"]))
@settings(derandomize=True, deadline=None)
def test_places_are_dealt_out_evenly(length: int, n_ranks: int, kind: ContextKind) -> None:
    places = places_of_ranks(length, n_ranks, kind)
    assert len({len(own) for own in places}) == 1
    dealt = torch.cat(places).sort().values.tolist()
    assert dealt == list(range(len(dealt)))
    assert length <= len(dealt) < length + 2 * n_ranks


def test_in_a_ring_each_rank_has_an_early_and_a_late_part() -> None:
    places = places_of_ranks(8, 2, "ring")
    assert [own.tolist() for own in places] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@st.composite
def pictures(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Pooling indices of pictures of some crops; a token of one may pool from all its crops."""
    rows: list[list[int]] = []
    n_crops = 0
    for size in draw(st.lists(st.integers(1, 3), max_size=6)):
        first, end = n_crops * N_PATCHES, (n_crops + size) * N_PATCHES
        patches = st.lists(st.integers(first, end - 1) | st.just(-1), min_size=2, max_size=2)
        rows += draw(st.lists(patches.filter(lambda p: max(p) >= 0), min_size=1, max_size=4))
        n_crops += size
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2), n_crops


@given(pictures(), st.integers(2, 4), st.sampled_from(["ulysses", "ring"]), st.data())
@settings(derandomize=True, deadline=None)
def test_features_arrive_where_their_tokens_are(
    drawn: tuple[torch.Tensor, int], n_ranks: int, kind: ContextKind, data: st.DataObject
) -> None:
    pooling, n_crops = drawn
    length = len(pooling) + data.draw(st.integers(1, 9))
    places = places_of_ranks(length, n_ranks, kind)
    n_places = len(places[0]) * n_ranks
    chosen = data.draw(st.permutations(range(length)))[: len(pooling)]
    is_patch = torch.zeros(1, n_places, dtype=torch.bool)
    is_patch[0, sorted(chosen)] = True
    shares = [
        vision_share(
            pooling,
            n_crops=n_crops,
            n_patches=N_PATCHES,
            is_patch=is_patch,
            places=places,
            rank=rank,
        )
        for rank in range(n_ranks)
    ]
    number = torch.full((n_places,), -1)
    number[is_patch[0]] = torch.arange(len(pooling))
    for rank, share in enumerate(shares):
        own = pooling[share.tokens]
        crops = own[own >= 0] // N_PATCHES
        assert all(share.crops.start <= crop < share.crops.stop for crop in crops.tolist())
        came = [list(torch.split(other.tokens, other.sent)[rank]) for other in shares]
        assert [len(part) for part in came] == share.received
        received = torch.tensor([token for part in came for token in part], dtype=torch.long)
        wanted = number[places[rank]]
        assert received[share.order].tolist() == wanted[wanted >= 0].tolist()


def test_frames_are_dealt_out_evenly_and_a_picture_stays_whole() -> None:
    frames = torch.arange(10)[:, None] * N_PATCHES
    even = crop_bounds(frames, n_crops=10, n_patches=N_PATCHES, n_ranks=4)
    assert even == [0, 2, 5, 7, 10]
    whole = torch.tensor([[0, 3 * N_PATCHES]])
    assert crop_bounds(whole, n_crops=4, n_patches=N_PATCHES, n_ranks=2) in ([0, 0, 4], [0, 4, 4])


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(TrainingError, match="1 processes cannot be divided: context_degree is 2"):
        make_mesh(ParallelConfig(context_degree=2))
    with pytest.raises(TrainingError, match="6 heads cannot be dealt out to 4 ranks"):
        check_heads(6, 4)
