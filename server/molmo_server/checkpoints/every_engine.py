"""Another checkpoint in every engine of a pool, or in none.

One engine is changed after the other, while the others answer; meanwhile both checkpoints are
served and each answer names its own. When a later one fails, the earlier ones go back.

Knows: the order, and which engines are not waited for. Does not know: how one engine loads
(`engine_pool.swap`) or is replaced (`blue_green`), which of the two fits (`rollout`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from molmo_core.checkpoints import Probe
from molmo_core.errors import CheckpointError
from molmo_server.checkpoints.blue_green import Examination, Exchange, exchange
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.checkpoints.live import LiveCheckpoint
from molmo_server.engine_pool import EnginePool, EngineState, RemoteEngine, SupervisedEngine
from molmo_server.engine_pool.swap import (
    NotNow,
    SwapLimits,
    SwapReport,
    Weights,
    load_when_it_comes,
    swap_in_place,
)
from molmo_server.engines import OwnEngines

logger = logging.getLogger(__name__)

SwapWay = Literal["auto", "in_place", "blue_green"]


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """How checkpoints are to be changed."""

    served_name: str
    max_model_len: int | None = None
    way: SwapWay = "auto"
    """"auto": in place where that is possible and nothing is to be examined beside it."""
    limits: SwapLimits = field(default_factory=SwapLimits)
    leave_s: float = 120.0
    """How long an engine that is replaced may finish what it began."""
    examination: Examination = field(default_factory=Examination)


class EveryEngine:
    def __init__(
        self,
        plan: RolloutPlan,
        *,
        live: LiveCheckpoint,
        engines: EnginePool,
        own: OwnEngines | None,
        probes: Mapping[str, tuple[Probe, ...]],
        on_phase: Callable[[str], None],
    ) -> None:
        """`own` makes engines whose processes are ours; `probes` by checkpoint."""
        self._plan, self._live, self._pool, self._own = plan, live, engines, own
        self._probes, self._on_phase = probes, on_phase
        self._numbers = itertools.count(len(engines.engines))

    async def load(self, new: Checkpoint) -> dict[str, float]:
        """In place; returns the seconds of each phase by engine. Raises CheckpointError."""
        old = self._live.current
        await self._steady()
        seconds: dict[str, float] = {}
        changed: list[RemoteEngine] = []
        away = self._away()
        present = [engine for engine in self._pool.engines if engine not in away]
        if not present:
            raise NotNow("no engine is running; nothing was loaded")
        try:
            for engine in present:
                self._on_phase(f"loading in place, {engine.name}")
                report = await self._swap(engine, new, old)
                changed.append(engine)
                seconds |= {f"{engine.name} {k}": v for k, v in report.seconds.items()}
        except CheckpointError:
            for engine in changed:
                try:
                    await self._swap(engine, old, new)
                except CheckpointError as worse:  # each answer still names what computed it
                    logger.error("engine %s keeps %s: %s", engine.name, new.id, worse)
            raise
        self._serve(new, away)
        return seconds

    async def exchange(self, new: Checkpoint) -> Exchange:
        """By an engine beside each; the first is examined for all. Raises CheckpointError."""
        old = self._live.current
        await self._steady()
        drained = [e for e in self._pool.engines if e.state is EngineState.STOPPED]
        replaced = [engine for engine in self._pool.engines if engine not in drained]
        if not replaced:
            raise NotNow("all engines are drained; start one again")
        done: list[Exchange] = []
        changed: list[RemoteEngine] = []
        self._live.candidate = new
        try:
            for engine in replaced:
                is_last = engine is replaced[-1]
                second = self._second_engine(new, engine)
                on_chosen = partial(self._serve, new, drained) if is_last else _nothing_yet
                examination = Examination() if done else self._plan.examination
                done.append(await self._exchange(engine, second, examination, on_chosen))
                changed.append(second)
        except CheckpointError:
            for engine in changed:
                await self._exchange_back(engine, old)
            raise
        finally:
            self._live.candidate = None
        return done[0]

    def _serve(self, new: Checkpoint, away: list[RemoteEngine]) -> None:
        """All that answer have it; those that do not will have it when they do."""
        if new.id != self._live.current.id:
            self._live.previous, self._live.current = self._live.current, new
        for engine in away:
            load_when_it_comes(engine, self._weights(new, engine))

    async def _steady(self) -> None:
        """Whoever is leaving or being started again has done so: it would miss the change."""
        for engine in self._pool.engines:
            await engine.steady()

    def _away(self) -> list[RemoteEngine]:
        """Engines that are not waited for: they were drained or given up, or run elsewhere and do
        not answer while others do."""

        def is_away(engine: RemoteEngine) -> bool:
            if engine.state in (EngineState.STOPPED, EngineState.FAILED):
                return True
            is_own = isinstance(engine, SupervisedEngine)
            return engine.state is EngineState.STARTING and not is_own and self._pool.is_ready

        return [engine for engine in self._pool.engines if is_away(engine)]

    # --- one engine -----------------------------------------------------------------------------

    async def _swap(self, engine: RemoteEngine, new: Checkpoint, old: Checkpoint) -> SwapReport:
        return await swap_in_place(
            engine,
            self._weights(new, engine),
            self._weights(old, engine),
            model=self._plan.served_name,
            limits=self._plan.limits,
        )

    def _weights(self, checkpoint: Checkpoint, engine: RemoteEngine) -> Weights:
        is_own = self._own is not None and isinstance(engine, SupervisedEngine)
        return Weights(
            folder=checkpoint.folder,
            id=checkpoint.id,
            probes=self._probes.get(checkpoint.id, ()),
            process=self._own.process(checkpoint, engine.name) if is_own and self._own else None,
        )

    def _second_engine(self, checkpoint: Checkpoint, beside: RemoteEngine) -> SupervisedEngine:
        assert self._own is not None, "the rollout has seen to it"
        assert isinstance(beside, SupervisedEngine), "the rollout has seen to it"
        return self._own.on_trial(checkpoint, self._own.name(next(self._numbers)), beside)

    async def _exchange(
        self,
        replaced: RemoteEngine,
        second: SupervisedEngine,
        examination: Examination,
        on_chosen: Callable[[], None],
    ) -> Exchange:
        return await exchange(
            self._pool,
            second,
            self._probes.get(second.checkpoint_id, ()),
            examination,
            model=self._plan.served_name,
            current_id=self._live.current.id,
            replaced=replaced,
            limits=self._plan.limits.probes,
            drain_s=self._plan.leave_s,
            on_phase=self._on_phase,
            on_chosen=on_chosen,
        )

    async def _exchange_back(self, engine: RemoteEngine, old: Checkpoint) -> None:
        """One that cannot be had back with the old checkpoint leaves: there are others."""
        try:
            second = self._second_engine(old, engine)
            await self._exchange(engine, second, Examination(), _nothing_yet)
        except CheckpointError as worse:
            logger.error("engine %s leaves, %s does not start: %s", engine.name, old.id, worse)
            self._pool.remove(engine, drain_s=self._plan.leave_s)


def _nothing_yet() -> None:
    """Other engines are to follow, or nothing is new."""
