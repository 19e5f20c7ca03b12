"""Batches without end: kinds of examples are drawn by rate, a batch holds one kind.

Batches come in groups of `GROUP_SIZE` of one kind, whose rows are sorted by length before they
are cut into batches: half of a batch would be padding otherwise.

Knows: padding and collation, and that a group depends on the seed and its number alone, so that
a run can be resumed at any group. Does not know: what the examples are about, models.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from molmo_training.data.example import Batch, Example, Tokenized
from molmo_training.data.packing import joined_pooling
from molmo_training.data.tokenize import Tokenizing


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of examples: how to make one, how often a batch is of it, rows a batch.

    It is drawn in the groups [first_group, end_group); None: to the end.
    """

    name: str
    make: Callable[[np.random.Generator], Example]
    rate: float
    batch_size: int
    first_group: int = 0
    end_group: int | None = None

    def is_drawn_in(self, group: int) -> bool:
        return self.first_group <= group and (self.end_group is None or group < self.end_group)


T = TypeVar("T")

GROUP_SIZE = 4


class BatchStream(IterableDataset[Batch]):
    """Batches from batch `first_batch` on, rounded down to a whole group."""

    def __init__(
        self, sources: Sequence[Source], tokenizing: Tokenizing, seed: int, first_batch: int = 0
    ) -> None:
        self.sources, self.tokenizing = tuple(sources), tokenizing
        self.seed, self.first_group = seed, first_batch // GROUP_SIZE

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        step, start = (1, 0) if worker is None else (worker.num_workers, worker.id)
        number = self.first_group + start
        while True:
            yield from self.group(number)
            number += step

    def group(self, number: int) -> list[Batch]:
        """The batches of a group, in an order drawn with the group's own generator."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, number]))
        drawn = [source for source in self.sources if source.is_drawn_in(number)]
        rates = np.array([source.rate for source in drawn])
        source = drawn[int(rng.choice(len(rates), p=rates / rates.sum()))]
        size = source.batch_size
        rows = [self.tokenizing(source.make(rng)) for _ in range(size * GROUP_SIZE)]
        rows.sort(key=lambda row: len(row.input_ids))
        order = rng.permutation(GROUP_SIZE)
        return [collate(rows[k * size : (k + 1) * size]) for k in order]


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
