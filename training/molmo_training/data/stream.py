"""Packed batches without end, the same on any number of ranks and workers, and resumable exactly.

The examples of a run are dealt out to a fixed number of lanes, one after the other. A lane packs
its own examples and gives every `n_lanes`-th pack of the run; a rank serves every `world_size`-th
lane, a worker some lanes of its rank. So a pack depends on its lane alone, and the state of a run
is a few numbers for each lane.

Knows: which example goes where, and that a bad one is left out. Does not know: what examples are
about, how batches are trained on. Source of the order of examples: `mixture`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import cycle
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset

from molmo_core.errors import DataError
from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.loader import collate, make_loader
from molmo_training.data.mixture import Draw, DrawSequence, Group, effective_shares
from molmo_training.data.packing import Budgets, Packer, Size, pack_rows

_LOG = logging.getLogger(__name__)


class SizedRow(Protocol):
    """An example whose size is known; its media may wait on disk until it is packed."""

    @property
    def size(self) -> Size: ...

    def row(self) -> Tokenized: ...


class RowSource(Protocol):
    """A dataset as the stream sees it. What `make` draws, it draws with the generator it gets."""

    def __len__(self) -> int:
        """The number of examples, without reading them."""
        ...

    def make(self, index: int, rng: np.random.Generator) -> SizedRow: ...


@dataclass(frozen=True)
class ReadyRow:
    """A row that is complete already: simple, and the buffer then holds its pixels."""

    tokenized: Tokenized

    @property
    def size(self) -> Size:
        return Size(len(self.tokenized.input_ids), len(self.tokenized.crops))

    def row(self) -> Tokenized:
        return self.tokenized


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Everything that decides what is in which batch.

    `n_lanes` has to be divisible by every number of ranks that the run is to go on with, times the
    rows of a batch: the packs of an optimizer step are a good choice. Each lane holds `buffer_size`
    examples that wait.
    """

    mixture: Group
    budgets: Budgets
    n_lanes: int
    buffer_size: int = 48
    rows_per_batch: int = 1
    seed: int = 50_189
    n_bad_allowed: int = 3
    bad_share_allowed: float = 0.01
    """A lane leaves out bad examples up to `n_bad_allowed` and this share of what it drew."""


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Where a lane stands. `waiting`: number, tokens and crops of each example in its buffer."""

    n_drawn: int = 0
    n_packs: int = 0
    n_bad: int = 0
    waiting: tuple[tuple[int, int, int], ...] = ()


class _Waits:
    """An example in the buffer; after a resume it is made only when its pack is."""

    def __init__(self, number: int, made: SizedRow | None = None) -> None:
        self.number, self.made = number, made


class Lane:
    """Every `n_lanes`-th example of the run, packed; `bad` holds what was left out and why."""

    def __init__(self, plan: Plan, number: int, state: LaneState) -> None:
        self.plan, self.number, self.state = plan, number, state
        self.bad: list[str] = []
        self._packer: Packer[_Waits] = Packer(plan.config.budgets, plan.config.buffer_size)
        for example, n_tokens, n_crops in state.waiting:
            self._packer.add(Size(n_tokens, n_crops), _Waits(example))

    def next_pack(self) -> list[Tokenized]:
        """The rows of the next pack. Raises DataError when too many examples were bad."""
        rows: list[Tokenized] = []
        while not rows:
            while not self._packer.is_full:
                self._add_next()
            for size, waits in self._packer.pop():
                rows += self._row(waits, size)
        waiting = tuple((waits.number, *size) for size, waits in self._packer.waiting)
        self.state = replace(self.state, n_packs=self.state.n_packs + 1, waiting=waiting)
        return rows

    def _add_next(self) -> None:
        number = self.state.n_drawn * self.plan.config.n_lanes + self.number
        self.state = replace(self.state, n_drawn=self.state.n_drawn + 1)
        draw = self.plan.draws(number)
        try:
            made = self.plan.make(draw)
            self._packer.add(made.size, _Waits(number, made))
        except Exception as error:  # noqa: BLE001 - a dataset may do anything
            self._leave_out(draw, error)

    def _row(self, waits: _Waits, size: Size) -> list[Tokenized]:
        draw = self.plan.draws(waits.number)
        try:
            made = waits.made or self.plan.make(draw)
            if made.size != size:
                raise DataError(f"its size was {tuple(size)} before the stop, is {made.size} now")
            row = made.row()
        except Exception as error:  # noqa: BLE001 - a dataset may do anything
            self._leave_out(draw, error)
            return []
        factor = np.float32(self.plan.draws.loss_factor(draw.dataset))
        return [replace(row, weights=row.weights * factor)]

    def _leave_out(self, draw: Draw, error: Exception) -> None:
        self.bad.append(f"{draw}: {type(error).__name__}: {error}")
        state, config = self.state, self.plan.config
        self.state = replace(state, n_bad=state.n_bad + 1)
        allowed = max(config.n_bad_allowed, config.bad_share_allowed * state.n_drawn)
        if self.state.n_bad > allowed:
            raise DataError(
                f"{self.state.n_bad} of the {state.n_drawn} examples of lane {self.number} were "
                f"bad, {allowed:.0f} are allowed. The last: {'; '.join(self.bad[-3:])}. Repair or "
                "leave out these examples, or allow more"
            ) from error


class Plan:
    """The mixture over actual datasets: what is drawn when, and how it is made."""

    def __init__(self, config: StreamConfig, sources: Mapping[str, RowSource]) -> None:
        self.config, self.sources = config, sources
        sizes = {name: len(source) for name, source in sources.items()}
        shares = effective_shares(config.mixture, sizes)
        self.draws = DrawSequence(shares, sizes, config.seed)
        drawn = [(*share, sizes[share.dataset]) for share in shares]
        self.identity: dict[str, Any] = {
            "seed": config.seed,
            "n_lanes": config.n_lanes,
            "buffer_size": config.buffer_size,
            "budgets": asdict(config.budgets),
            "mixture": hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16],
        }
        """What a state must have been made with to go on with it."""

    def make(self, draw: Draw) -> SizedRow:
        return self.sources[draw.dataset].make(draw.index, self.draws.generator(draw))


@dataclass(frozen=True, kw_only=True)
class _Delivered:
    """A batch with the states of its lanes after it, and the bad examples met on the way."""

    batch: Batch
    states: dict[int, LaneState]
    bad: tuple[str, ...] = field(default=())


class _LaneGroups(IterableDataset[_Delivered | DataError]):
    """The batches of some groups of lanes, taking turns; a group gives the rows of a batch."""

    def __init__(self, groups: Sequence[Sequence[Lane]]) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[_Delivered | DataError]:
        """An error comes as a value: raised in a worker it would get the loader's traceback."""
        for lanes in cycle(self.groups):
            try:
                yield _delivered(lanes)
            except DataError as error:
                yield error
                return


def _delivered(lanes: Sequence[Lane]) -> _Delivered:
    packs = [lane.next_pack() for lane in lanes]
    batch = collate([pack_rows(pack) for pack in packs])
    bad = tuple(reason for lane in lanes for reason in lane.bad)
    for lane in lanes:
        lane.bad.clear()
    return _Delivered(
        batch=replace(batch, n_examples=sum(map(len, packs))),
        states={lane.number: lane.state for lane in lanes},
        bad=bad,
    )


class PackedStream:
    """The batches of one rank. Batch b of rank r has the packs from number
    (b · rows_per_batch) · world_size + r on, every world_size-th.

    `state()` says where the rank stands after the batches handed out; the states of all ranks,
    merged, are what any other number of ranks and workers goes on with.
    """

    def __init__(
        self,
        config: StreamConfig,
        sources: Mapping[str, RowSource],
        *,
        rank: int = 0,
        world_size: int = 1,
        n_workers: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if config.n_lanes % (world_size * config.rows_per_batch):
            raise DataError(
                f"n_lanes is {config.n_lanes}; {world_size} ranks with {config.rows_per_batch} "
                "rows a batch need a multiple of their product"
            )
        self.plan = Plan(config, sources)
        self.rank, self.world_size, self.n_workers = rank, world_size, n_workers
        start = _lane_states(state, self.plan.identity, config.n_lanes)
        self._states = {lane: start[lane] for lane in range(rank, config.n_lanes, world_size)}
        self._n_batches = self._batches_before(sum(lane.n_packs for lane in start.values()))

    def _batches_before(self, n_packs: int) -> int:
        a_turn = self.world_size * self.plan.config.rows_per_batch
        if n_packs % a_turn:
            raise DataError(
                f"the state is one after {n_packs} packs; {self.world_size} ranks with "
                f"{self.plan.config.rows_per_batch} rows a batch go on after a multiple of {a_turn}"
            )
        return n_packs // a_turn

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the stream stands; one iterator at a time is of use."""
        groups = self._lane_groups
        n_feeds = max(min(self.n_workers, len(groups)), 1)
        turns = [b % len(groups) for b in range(self._n_batches, self._n_batches + len(groups))]
        feeds = [
            self._feed([group for group in turns if group % n_feeds == feed])
            for feed in range(n_feeds)
        ]
        while True:
            delivered = next(feeds[self._n_batches % len(groups) % n_feeds])
            if isinstance(delivered, DataError):
                feeds.clear()  # ends the workers now, not when the traceback is gone
                raise delivered
            self._states |= delivered.states
            self._n_batches += 1
            for reason in delivered.bad:
                _LOG.warning("a bad example is left out: %s", reason)
            yield delivered.batch

    @cached_property
    def _lane_groups(self) -> list[list[int]]:
        """The lanes of this rank, by the batches that they make together."""
        lanes, size = sorted(self._states), self.plan.config.rows_per_batch
        return [lanes[k : k + size] for k in range(0, len(lanes), size)]

    def _feed(self, groups: Sequence[int]) -> Iterator[_Delivered | DataError]:
        """What one worker hands out: the batches of its groups of lanes, in turn."""
        lanes = [
            [Lane(self.plan, lane, self._states[lane]) for lane in self._lane_groups[group]]
            for group in groups
        ]
        return iter(make_loader(_LaneGroups(lanes), n_workers=min(self.n_workers, 1)))

    def state(self) -> dict[str, Any]:
        """Where the lanes of this rank stand, for JSON."""
        lanes = {str(number): asdict(lane) for number, lane in sorted(self._states.items())}
        return {**self.plan.identity, "lanes": lanes}


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of its ranks after the same number of batches."""
    merged: dict[str, Any] = {}
    for state in states:
        lanes = {**merged.get("lanes", {}), **state["lanes"]}
        merged = {**state, "lanes": lanes}
    return merged


def _lane_states(
    state: Mapping[str, Any] | None, identity: Mapping[str, Any], n_lanes: int
) -> dict[int, LaneState]:
    """Raises DataError for a state of another run, or of which ranks are missing."""
    if state is None:
        return {lane: LaneState() for lane in range(n_lanes)}
    for name, value in identity.items():
        if state.get(name) != value:
            raise DataError(
                f"the state was made with {name} {state.get(name)}, the run has {value}: go on "
                "with the settings and datasets of the state, or start anew"
            )
    if missing := [lane for lane in range(n_lanes) if str(lane) not in state["lanes"]]:
        raise DataError(
            f"the state has nothing of lanes {missing[:8]}; merge the states of all ranks"
        )
    return {lane: _lane_state(state["lanes"][str(lane)]) for lane in range(n_lanes)}


def _lane_state(saved: Mapping[str, Any]) -> LaneState:
    waiting = tuple((number, n_tokens, n_crops) for number, n_tokens, n_crops in saved["waiting"])
    return LaneState(**{**saved, "waiting": waiting})
