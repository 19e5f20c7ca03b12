"""Packing: several examples in one row, within a budget of tokens and one of crops.

Examples wait in a buffer. A pack is the one that has waited longest together with those that
fill both budgets best, found exactly. So nothing is split or left behind, and an example waits for
at most as many packs as stood before it.

Knows: sizes, and how arrays of examples are joined so that they do not see each other. Does not
know: where examples come from, batches, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from molmo_hf.modeling_molmo2 import EXAMPLE_STRIDE
from molmo_training.data.example import Tokenized

T = TypeVar("T")


class Size(NamedTuple):
    """What an example takes of the two budgets."""

    n_tokens: int
    n_crops: int


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What a pack may hold at most."""

    n_tokens: int
    n_crops: int

    def hold(self, size: Size) -> bool:
        return 0 < size.n_tokens <= self.n_tokens and 0 <= size.n_crops <= self.n_crops


class Packer(Generic[T]):
    """A buffer of examples that are packed when it is full; its order is that of arrival."""

    def __init__(self, budgets: Budgets, buffer_size: int = 48) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size is {buffer_size}; at least 1 example has to wait")
        self.budgets, self.buffer_size = budgets, buffer_size
        self.waiting: list[tuple[Size, T]] = []

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self.buffer_size

    def add(self, size: Size, item: T) -> None:
        """Raises ValueError for an example that no pack can hold."""
        if not self.budgets.hold(size):
            raise ValueError(
                f"{size.n_tokens} tokens and {size.n_crops} crops; a pack holds "
                f"{self.budgets.n_tokens} tokens and {self.budgets.n_crops} crops: raise the "
                "budgets, or give the example fewer branches, frames or crops"
            )
        self.waiting.append((size, item))

    def pop(self) -> list[tuple[Size, T]]:
        """The next pack, in order of arrival. Raises IndexError when nothing waits."""
        chosen = best_subset([size for size, _ in self.waiting], self.budgets)
        pack = [self.waiting[k] for k in chosen]
        left = set(range(len(self.waiting))).difference(chosen)
        self.waiting = [self.waiting[k] for k in sorted(left)]
        return pack


def best_subset(sizes: Sequence[Size], budgets: Budgets) -> list[int]:
    """The first example and those that with it fill the budgets best, as rising indices.

    Best is the largest sum of the shares of both budgets; among equals the earlier examples. The
    worth of a subset follows from its size, so that it is enough to know which sizes can be
    reached: for each number of crops an integer whose bit n says that n tokens can be left. Adding
    an example is a shift; what does not fit falls off at the end.
    """
    first = sizes[0]
    reached = {first.n_crops: 1 << (budgets.n_tokens - first.n_tokens)}
    before: list[dict[int, int]] = []
    for size in sizes[1:]:
        if reached.get(budgets.n_crops, 0) & 1:
            break  # both budgets are full
        before.append(reached)
        reached = _with_one_more(reached, size, budgets.n_crops)
    n_crops, n_left = _fullest(reached, budgets)
    chosen = []
    for k in range(len(before), 0, -1):
        if not before[k - 1].get(n_crops, 0) >> n_left & 1:
            chosen.append(k)
            n_crops -= sizes[k].n_crops
            n_left += sizes[k].n_tokens
    return [0, *reversed(chosen)]


def _with_one_more(reached: dict[int, int], size: Size, most_crops: int) -> dict[int, int]:
    grown = dict(reached)
    for n_crops, left in reached.items():
        if n_crops + size.n_crops <= most_crops and (shifted := left >> size.n_tokens):
            grown[n_crops + size.n_crops] = grown.get(n_crops + size.n_crops, 0) | shifted
    return grown


def _fullest(reached: dict[int, int], budgets: Budgets) -> tuple[int, int]:
    """Crops and tokens left of the best size that can be reached."""

    def worth(size: tuple[int, int]) -> tuple[int, int]:
        n_crops, n_left = size
        n_tokens = budgets.n_tokens - n_left
        return n_tokens * budgets.n_crops + n_crops * budgets.n_tokens, n_tokens

    fewest_left = ((c, (left & -left).bit_length() - 1) for c, left in reached.items())
    return max(fewest_left, key=worth)


def pack_rows(rows: Sequence[Tokenized]) -> Tokenized:
    """One row of several: example k's subsegments are k · `EXAMPLE_STRIDE` higher.

    Positions start anew in each example, as they do where it is alone; pooling indices count over
    the crops of the whole pack.
    """
    joined = {
        field.name: np.concatenate([getattr(row, field.name) for row in rows])
        for field in fields(Tokenized)
        if field.name not in ("pooling", "subsegments", "n_cut")
    }
    subsegments = [row.subsegments + k * EXAMPLE_STRIDE for k, row in enumerate(rows)]
    return Tokenized(
        **joined,
        pooling=joined_pooling(rows),
        subsegments=np.concatenate(subsegments),
        n_cut=sum(row.n_cut for row in rows),
    )


def joined_pooling(rows: Sequence[Tokenized]) -> NDArray[np.int64]:
    """Pooling indices behind the patches of the rows before, (M, K) with the widest row's K.

    Rows that pool fewer patches (images beside video) are filled up with −1. A model that does not
    mask missing patches (`pooling_attention_mask` off) takes them into its mean.
    """
    width = max(row.pooling.shape[1] for row in rows)
    parts, first = [], 0
    for row in rows:
        part = np.where(row.pooling >= 0, row.pooling + first, -1)
        missing = width - part.shape[1]
        parts.append(np.pad(part, ((0, 0), (0, missing)), constant_values=-1))
        first += row.crops.shape[0] * row.crops.shape[1]
    return np.concatenate(parts)
