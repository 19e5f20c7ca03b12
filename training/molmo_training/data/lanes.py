"""Lanes: each packs its own share of a run's examples, whatever process it lives in.

A lane is a few numbers (`LaneState`) and what follows from them: which examples it draws, which of
them wait and what its next pack is.

Knows: the order of examples, that a bad one is left out, up to an allowance. Does not know: ranks,
workers, batches. Source of the order: `mixture`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from molmo_core.errors import DataError
from molmo_training.data.example import Tokenized
from molmo_training.data.mixture import Draw, DrawSequence, Group, effective_shares
from molmo_training.data.packing import Budgets, Packer, Size


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
        return _size_of(self.tokenized)

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
    n_bad_allowed: int = 10
    bad_share_allowed: float = 0.01
    """A lane leaves out this share of what it drew, and `n_bad_allowed` more: among many lanes some
    meet several bad examples early."""


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
            row = (waits.made or self.plan.make(draw)).row()
            if (actual := _size_of(row)) != size:
                raise DataError(
                    f"it has {actual.n_tokens} tokens and {actual.n_crops} crops, had "
                    f"{size.n_tokens} and {size.n_crops} when it was put aside for packing"
                )
        except Exception as error:  # noqa: BLE001 - a dataset may do anything
            self._leave_out(draw, error)
            return []
        factor = np.float32(self.plan.draws.loss_factor(draw.dataset))
        return [replace(row, weights=row.weights * factor)]

    def _leave_out(self, draw: Draw, error: Exception) -> None:
        self.bad.append(f"{draw}: {type(error).__name__}: {error}")
        state, config = self.state, self.plan.config
        self.state = replace(state, n_bad=state.n_bad + 1)
        allowed = config.n_bad_allowed + int(config.bad_share_allowed * state.n_drawn)
        if self.state.n_bad > allowed:
            raise DataError(
                f"{self.state.n_bad} of the {state.n_drawn} examples of lane {self.number} were "
                f"bad, {allowed} are allowed. The last: {'; '.join(self.bad[-3:])}. Repair or "
                "leave out these examples, or allow more"
            ) from error


def _size_of(row: Tokenized) -> Size:
    return Size(len(row.input_ids), len(row.crops))


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
