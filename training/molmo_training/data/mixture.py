"""Which example is drawn when: nested rates, epochs, and generators for each example.

Example number n of a run is the same on any number of ranks and workers: it follows from the seed,
the shares and the sizes of the datasets. Knows: names, sizes and shares. Does not know: examples.
Source: mixtures and random streams of Molmo2's training.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A dataset in a group: drawn by the root of its size, unless `rate` says how often.

    `as_size` takes the place of the size: 1 and more is a number of examples (a cap), less than 1 a
    part of the dataset's own size. `weight` multiplies whichever it is.
    """

    dataset: str
    rate: float | None = None
    as_size: float | None = None
    weight: float = 1.0
    loss_factor: float = 1.0
    """Factor on the loss weights of the dataset's tokens, beside those that its examples have."""

    def mass(self, size: int) -> float:
        """How often it is drawn, in proportion to the other parts of its group."""
        if self.rate is not None:
            return self.rate * self.weight
        if self.as_size is not None:
            size_counted = self.as_size if self.as_size >= 1 else self.as_size * size
            return math.sqrt(size_counted) * self.weight
        return math.sqrt(size) * self.weight


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parts and groups that share `rate` of what the group stands in; rates need not sum to 1."""

    name: str
    parts: tuple[Part | Group, ...]
    rate: float = 1.0


class Share(NamedTuple):
    """Which part of all examples a dataset is, and the factor on its loss weights."""

    dataset: str
    share: float
    loss_factor: float


def effective_shares(mixture: Group, sizes: Mapping[str, int]) -> tuple[Share, ...]:
    """The datasets of a mixture by name; shares sum to 1. A dataset of two groups has both shares.

    Raises DataError for an unknown or empty dataset, a negative rate, two loss factors of one
    dataset, and a mixture in which nothing is drawn.
    """
    shares: dict[str, Share] = {}
    for part, share in _leaves(mixture, 1.0, sizes):
        known = shares.get(part.dataset)
        if known is not None and known.loss_factor != part.loss_factor:
            raise DataError(
                f"{part.dataset} has the loss factors {known.loss_factor} and {part.loss_factor}; "
                "a dataset has one: give the second use a name of its own"
            )
        before = 0.0 if known is None else known.share
        shares[part.dataset] = Share(part.dataset, before + share, part.loss_factor)
    return tuple(shares[name] for name in sorted(shares) if shares[name].share > 0)


def _leaves(group: Group, share: float, sizes: Mapping[str, int]) -> Iterator[tuple[Part, float]]:
    masses = [_mass(part, sizes) for part in group.parts]
    if sum(masses) <= 0:
        raise DataError(f"nothing of the group {group.name} is drawn: its rates are 0")
    for part, mass in zip(group.parts, masses, strict=True):
        part_share = share * mass / sum(masses)
        if isinstance(part, Group):
            if part_share:
                yield from _leaves(part, part_share, sizes)
        else:
            yield part, part_share


def _mass(part: Part | Group, sizes: Mapping[str, int]) -> float:
    if isinstance(part, Group):
        name, mass = part.name, part.rate
    else:
        name = part.dataset
        if name not in sizes:
            near = difflib.get_close_matches(name, sizes, n=3) or sorted(sizes)
            raise DataError(f"there is no dataset {name}; near are {', '.join(near)}")
        mass = part.mass(sizes[name])
        if sizes[name] < 1 and part.mass(1) > 0:
            raise DataError(f"the dataset {name} is empty; fill it or give it rate 0")
    if not (math.isfinite(mass) and mass >= 0):
        raise DataError(f"{name} is drawn at a rate of {mass}; rates and weights are 0 or more")
    return mass


def shares_table(mixture: Group, sizes: Mapping[str, int], n_examples: int | None = None) -> str:
    """The effective shares as text: of all examples, and the epochs in `n_examples` of them."""
    lines = [f"{'dataset':40s} {'size':>10s} {'share':>8s}" + (" epochs" if n_examples else "")]
    for name, share, _ in effective_shares(mixture, sizes):
        line = f"{name:40s} {sizes[name]:10,d} {share:8.3%}"
        lines.append(line + (f" {share * n_examples / sizes[name]:6.2f}" if n_examples else ""))
    return "\n".join(lines)


@dataclass(frozen=True)
class Draw:
    """Example `index` of a dataset, drawn in its epoch `epoch`."""

    dataset: str
    index: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.dataset}[{self.index}] in epoch {self.epoch}"


CHUNK_SIZE = 1 << 16
KEPT_CHUNKS = 8
"""Lanes drift apart by the sizes of their examples: 128 of them by about four chunks in a run."""


class DrawSequence:
    """The draws of a run by number: a dataset at random, by its share, of it the next example.

    An epoch of a dataset has each of its examples once. Going far ahead, as after a resume, costs
    the draws in between once.
    """

    def __init__(self, shares: tuple[Share, ...], sizes: Mapping[str, int], seed: int) -> None:
        self.seed = seed
        self.shares, self.sizes = shares, [sizes[share.dataset] for share in shares]
        self._rates = np.array([share.share for share in shares])
        self._rates /= self._rates.sum()
        state = np.random.RandomState(seed).get_state(legacy=False)
        self._starts = [(state, np.zeros(len(shares), dtype=np.int64))]  # of each chunk
        self._chunks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._orders: dict[tuple[int, int], NDArray[np.int32]] = {}

    def __call__(self, number: int) -> Draw:
        chosen, nth = self._chunk(number // CHUNK_SIZE)
        which, count = int(chosen[number % CHUNK_SIZE]), int(nth[number % CHUNK_SIZE])
        epoch, place = divmod(count, self.sizes[which])
        return Draw(self.shares[which].dataset, int(self._order(which, epoch)[place]), epoch)

    def loss_factor(self, dataset: str) -> float:
        return next(share.loss_factor for share in self.shares if share.dataset == dataset)

    def _chunk(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which dataset each draw of a chunk is of, and how often that was drawn before."""
        if number not in self._chunks:
            while len(self._starts) <= number:
                chosen, after = self._chosen(len(self._starts) - 1)
                counts = self._starts[-1][1] + np.bincount(chosen, minlength=len(self.shares))
                self._starts.append((after, counts))
            chosen, _ = self._chosen(number)
            nth = _counted(chosen, self._starts[number][1])
            for old in list(self._chunks)[: -(KEPT_CHUNKS - 1)]:
                del self._chunks[old]
            self._chunks[number] = (chosen, nth)
        return self._chunks[number]

    def _chosen(self, chunk: int) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """The datasets of a chunk's draws, and the state of the random numbers after it."""
        random = np.random.RandomState()
        random.set_state(self._starts[chunk][0])
        chosen = random.choice(len(self.shares), size=CHUNK_SIZE, p=self._rates)
        return chosen, random.get_state(legacy=False)

    def _order(self, which: int, epoch: int) -> NDArray[np.int32]:
        if (which, epoch) not in self._orders:
            order = epoch_order(self.sizes[which], epoch, self.seed)
            for old in [key for key in self._orders if key[0] == which and key[1] < epoch - 1]:
                del self._orders[old]
            self._orders[which, epoch] = order
        return self._orders[which, epoch]

    def generator(self, draw: Draw) -> np.random.Generator:
        """The generator of everything that is drawn in making this example."""
        name = zlib.crc32(draw.dataset.encode())
        return np.random.default_rng(item_seed(draw.index, draw.epoch, self.seed, name))


def _counted(chosen: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each draw how often its dataset was drawn before it."""
    by_dataset = np.argsort(chosen, kind="stable")
    n_of_each = np.bincount(chosen, minlength=len(before))
    first_of_each = np.cumsum(n_of_each) - n_of_each
    nth = np.empty_like(chosen)
    nth[by_dataset] = np.arange(len(chosen)) + np.repeat(before - first_of_each, n_of_each)
    return nth


def epoch_order(size: int, epoch: int, seed: int) -> NDArray[np.int32]:
    """The order in which an epoch of a dataset goes through its examples."""
    order = np.arange(size, dtype=np.int32)
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(epoch, 1)))
    np.random.RandomState(bits).shuffle(order)
    return order


def item_seed(index: int, epoch: int, *run: int) -> np.random.SeedSequence:
    """The seed of one example in one epoch.

    The reference's has no `run`, so that every run and dataset cut the same random crops.
    """
    return np.random.SeedSequence(index, spawn_key=(epoch, *run))
