"""Batches: padding, shifted pooling, resuming at a group."""

from __future__ import annotations

import numpy as np
import torch

from molmo_training.data.loader import GROUP_SIZE, BatchStream, Source, collate, make_loader
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing

SOURCES = [Source(name="image", make=image_example, rate=1.0, batch_size=2)]


def test_padding_is_not_valid_and_not_learnt(tokenizing: Tokenizing) -> None:
    rows = [tokenizing(image_example(np.random.default_rng(seed))) for seed in range(3)]
    batch = collate(rows)
    lengths = [len(row.input_ids) for row in rows]
    assert batch.valid.sum(dim=1).tolist() == lengths
    assert batch.weights[~batch.valid].abs().sum() == 0
    assert batch.input_ids.shape == (3, max(lengths))
    assert batch.n_examples == 3


def test_pooling_of_a_row_points_into_its_own_crops(tokenizing: Tokenizing) -> None:
    rows = [tokenizing(image_example(np.random.default_rng(seed))) for seed in range(3)]
    batch = collate(rows)
    flat = batch.crops.flatten(0, 1)
    first = 0
    for row in rows:
        n = row.pooling.shape[0]
        mine = batch.pooling[first : first + n]
        own = torch.from_numpy(row.crops).flatten(0, 1)
        inside = mine >= 0
        assert torch.equal(flat[mine[inside]], own[torch.from_numpy(row.pooling)[inside]])
        first += n
    assert first == batch.pooling.shape[0]


def test_a_stream_goes_on_at_any_group(tokenizing: Tokenizing) -> None:
    def ids(stream: BatchStream, n: int) -> list[list[list[int]]]:
        return [batch.input_ids.tolist() for batch, _ in zip(stream, range(n), strict=False)]

    whole = ids(BatchStream(SOURCES, tokenizing, seed=7), 3 * GROUP_SIZE)
    resumed = BatchStream(SOURCES, tokenizing, seed=7, first_batch=2 * GROUP_SIZE + 1)
    assert ids(resumed, GROUP_SIZE) == whole[2 * GROUP_SIZE :]
    assert ids(BatchStream(SOURCES, tokenizing, seed=8), 1) != whole[:1]


def test_workers_hand_out_the_same_groups(tokenizing: Tokenizing) -> None:
    stream = BatchStream(SOURCES, tokenizing, seed=7)
    alone = [batch.input_ids for batch, _ in zip(stream, range(2 * GROUP_SIZE), strict=False)]
    loader = iter(make_loader(stream, n_workers=1))
    assert all(torch.equal(next(loader).input_ids, ids) for ids in alone)
