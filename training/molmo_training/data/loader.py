"""Batches: rows collated, and prepared in processes of their own.

Knows: padding, shifted pooling, workers. Does not know: what rows are about, which ones are drawn.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.packing import joined_pooling

T = TypeVar("T")


def make_loader(
    stream: IterableDataset[T], *, n_workers: int, n_prefetched: int = 4
) -> DataLoader[T]:
    """Whole batches, prepared in `n_workers` processes, `n_prefetched` ahead in each."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=n_workers,
        prefetch_factor=n_prefetched if n_workers else None,
        persistent_workers=n_workers > 0,
        # Its own: a loader that starts draws a number, and dropout would differ after a resume.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals,
    )


def _leave_signals(_: int) -> None:
    """Terminals and schedulers signal every process: it is the trainer that saves and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(rows: Sequence[Tokenized]) -> Batch:
    """Pad rows to the longest; pooling indices are shifted behind the crops of earlier rows."""
    length = max(len(r.input_ids) for r in rows)

    def padded(name: str) -> torch.Tensor:
        arrays = [getattr(r, name) for r in rows]
        out = np.zeros((len(rows), length), dtype=arrays[0].dtype)
        for i, array in enumerate(arrays):
            out[i, : len(array)] = array
        return torch.from_numpy(out)

    lengths = torch.tensor([len(r.input_ids) for r in rows])
    return Batch(
        input_ids=padded("input_ids"),
        targets=padded("targets"),
        weights=padded("weights"),
        position_ids=padded("position_ids"),
        subsegments=padded("subsegments"),
        valid=torch.arange(length)[None] < lengths[:, None],
        crops=torch.from_numpy(np.concatenate([r.crops for r in rows])),
        pooling=torch.from_numpy(joined_pooling(rows)),
        patch_targets=torch.from_numpy(np.concatenate([r.patch_targets for r in rows])),
        token_targets=torch.from_numpy(np.concatenate([r.token_targets for r in rows])),
        about=padded("about"),
        shows=padded("shows"),
        n_examples=len(rows),
    )
