"""Packed batches without end, the same on any number of ranks and workers, and resumable exactly.

The examples of a run are dealt out to a fixed number of lanes, one after the other. A lane packs
its own examples and gives every `n_lanes`-th pack of the run; a rank serves every `world_size`-th
lane, a worker some lanes of its rank. So a pack depends on its lane alone, and the state of a run
is a few numbers for each lane.

Knows: which lane is served where, and how states of ranks make one of a run. Does not know: what
examples are about, how batches are trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import cycle
from typing import Any

from torch.utils.data import IterableDataset

from molmo_core.errors import DataError
from molmo_training.data.example import Batch
from molmo_training.data.lanes import Lane, LaneState, Plan, RowSource, StreamConfig
from molmo_training.data.loader import collate, make_loader
from molmo_training.data.packing import pack_rows

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Delivered:
    """A batch with the states of its lanes after it, and the bad examples met on the way."""

    batch: Batch
    states: dict[int, LaneState]
    bad: tuple[str, ...]


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
    rows = [pack_rows(pack) for pack in packs]
    n_examples, n_cut = sum(map(len, packs)), sum(row.n_cut for row in rows)
    bad = tuple(reason for lane in lanes for reason in lane.bad)
    for lane in lanes:
        lane.bad.clear()
    return _Delivered(
        batch=replace(collate(rows), n_examples=n_examples, n_cut=n_cut),
        states={lane.number: lane.state for lane in lanes},
        bad=bad,
    )


class PackedStream:
    """The batches of one rank. Batch b of rank r has the packs from number
    (b · rows_per_batch) · world_size + r on, every world_size-th.

    `state()` says where the rank stands after the batches handed out; the states of all ranks,
    merged, are what any other number of ranks and workers goes on with. Each worker makes
    `n_prefetched` batches ahead: their crops lie in shared memory.
    """

    def __init__(
        self,
        config: StreamConfig,
        sources: Mapping[str, RowSource],
        *,
        rank: int = 0,
        world_size: int = 1,
        n_workers: int = 0,
        n_prefetched: int = 2,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank} of {world_size}; ranks count from 0")
        if config.n_lanes % (world_size * config.rows_per_batch):
            raise DataError(
                f"n_lanes is {config.n_lanes}; {world_size} ranks with {config.rows_per_batch} "
                "rows a batch need a multiple of their product"
            )
        self.plan = Plan(config, sources)
        self.rank, self.world_size, self.n_workers = rank, world_size, n_workers
        self.n_prefetched = n_prefetched
        start = _lane_states(state, self.plan.identity, config.n_lanes)
        self._states = {lane: start[lane] for lane in range(rank, config.n_lanes, world_size)}
        self._n_batches = self._batches_before(_n_packs(start))

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
        if n_feeds < self.n_workers and self.rank == 0:
            _LOG.info(
                "n_workers is %d, a rank uses %d: as many as it has groups of lanes",
                self.n_workers,
                n_feeds,
            )
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
        loader = make_loader(
            _LaneGroups(lanes), n_workers=min(self.n_workers, 1), n_prefetched=self.n_prefetched
        )
        return iter(loader)

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


def _n_packs(lanes: Mapping[int, LaneState]) -> int:
    """The packs that a run has given. Raises DataError when its ranks stopped at different ones."""
    n_packs = sum(lane.n_packs for lane in lanes.values())
    for number, lane in lanes.items():
        if lane.n_packs != (expected := -(-(n_packs - number) // len(lanes))):
            raise DataError(
                f"lane {number} has given {lane.n_packs} packs where the others make it "
                f"{expected}: the ranks' states are of different batches; take those of one save"
            )
    return n_packs


def _lane_state(saved: Mapping[str, Any]) -> LaneState:
    waiting = tuple((number, n_tokens, n_crops) for number, n_tokens, n_crops in saved["waiting"])
    return LaneState(**{**saved, "waiting": waiting})
