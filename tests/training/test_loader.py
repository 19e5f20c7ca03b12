"""Batches: padding, shifted pooling."""

from __future__ import annotations

import numpy as np
import torch

from molmo_training.data.loader import collate
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing


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
