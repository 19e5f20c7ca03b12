"""Which checkpoint is served, and how it comes to be another one.

A rollout reads the store, checks a checkpoint against what is running, has every engine load it,
one after the other, and remembers what happened. What fails leaves the old one serving, with the
reason in the history.

Knows: the store, the engines, the order. Does not know: how an engine loads (`engine_pool.swap`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from molmo_core.checkpoint_store import (
    MANIFEST,
    CheckpointStore,
    Manifest,
    Probe,
    read_manifest,
)
from molmo_core.errors import Busy, CheckpointError, NotFound
from molmo_server.checkpoints.folder import Checkpoint, read_checkpoint, weight_differences
from molmo_server.engine_pool import EnginePool, EngineProcess, RemoteEngine
from molmo_server.engine_pool.swap import (
    NotNow,
    SwapLimits,
    SwapReport,
    Weights,
    swap_in_place,
)

logger = logging.getLogger(__name__)

Outcome = Literal["serving", "refused", "superseded"]
_HISTORY = 100
_POLL_S, _HOLD_EVERY_S = 1.0, 60.0
_SETTINGS = (
    "tokenizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""What prompts are made with and answers end with, as the engine read it at its start."""
_FREE_KEYS = ("transformers_version", "auto_map", "_name_or_path", "architectures")


@dataclass(frozen=True, kw_only=True)
class Event:
    """What was tried and how it ended."""

    checkpoint: str
    outcome: Outcome
    reason: str
    time_s: float
    """Seconds since 1970."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each phase, by engine and phase; empty when nothing was loaded."""


@dataclass(kw_only=True)
class LiveCheckpoint:
    """The one place that knows what is served; read it at the moment of use."""

    current: Checkpoint
    previous: Checkpoint | None = None


class Rollout:
    """Changes of checkpoint, one at a time."""

    def __init__(
        self,
        *,
        live: LiveCheckpoint,
        engines: EnginePool,
        store: CheckpointStore | None,
        process_of: Callable[[Checkpoint], EngineProcess] | None,
        served_name: str,
        max_model_len: int | None,
        limits: SwapLimits,
        follows: bool = True,
    ) -> None:
        self.live, self.store = live, store
        self.history: deque[Event] = deque(maxlen=_HISTORY)
        self._engines, self._process_of = engines, process_of
        self._served_name, self._max_model_len = served_name, max_model_len
        self._limits, self._follows = limits, follows
        self._holder = f"{socket.gethostname()}-{os.getpid()}"
        self._lock = asyncio.Lock()
        self._probes: dict[str, tuple[Probe, ...]] = {}
        if (live.current.folder / MANIFEST).exists():
            self._probes[live.current.id] = read_manifest(live.current.folder).probes

    @property
    def is_loading(self) -> bool:
        return self._lock.locked()

    async def activate(self, checkpoint_id: str) -> Event:
        """Serve a checkpoint of the store.

        Raises Busy while another change is going on, NotFound, and CheckpointError with the
        reason why the old one still serves.
        """
        if self._lock.locked():
            raise Busy("another checkpoint is being loaded; try again when it is done")
        async with self._lock:
            return await self._activate(checkpoint_id)

    async def roll_back(self) -> Event:
        """Serve what was served before. Raises as `activate`."""
        if self.live.previous is None:
            raise NotFound("nothing else was served since the start; there is no way back")
        return await self.activate(self.live.previous.id)

    def start_watching(self) -> list[asyncio.Task[None]]:
        """The tasks that follow the store; none without one."""
        if self.store is None:
            return []
        tasks = [asyncio.create_task(self.follow()), asyncio.create_task(self.keep_lease())]
        for task in tasks:
            task.add_done_callback(_complain_about)
        return tasks

    async def follow(self) -> None:
        """Follow the store's pointer until cancelled.

        What was refused is not tried again before the pointer has moved; what only could not be
        tried now is.
        """
        if not self._follows:
            return
        heard: str | None = self.live.current.id
        told = ""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                wanted = await asyncio.to_thread(self._pointer)
                told = ""
            except (CheckpointError, OSError) as error:
                if told != str(error):
                    self._note(checkpoint="?", outcome="refused", reason=str(error))
                told = str(error)
                continue
            if wanted is None or wanted == heard or self.is_loading:
                continue
            heard = wanted
            if wanted == self.live.current.id:
                continue
            try:
                await self.activate(wanted)
            except Busy:
                heard = None
            except (CheckpointError, NotFound) as error:
                logger.error("the store's current checkpoint is not served: %s", error)
                if isinstance(error.__cause__, NotNow):
                    heard = None

    async def keep_lease(self) -> None:
        """Tell the store what is served, until cancelled, so that retention leaves it alone."""
        try:
            while True:
                await self._hold()
                await asyncio.sleep(_HOLD_EVERY_S)
        finally:
            if self.store is not None:
                self.store.release(self._holder)

    async def _hold(self, *more: str) -> None:
        """A store that cannot be written to is served from all the same."""
        if self.store is None:
            return
        previous = [self.live.previous.id] if self.live.previous else []
        held = {self.live.current.id, *previous, *more}
        try:
            await asyncio.to_thread(self.store.hold, self._holder, held)
        except OSError as error:
            logger.warning("the store cannot be told what is served: %s", error)

    def _pointer(self) -> str | None:
        assert self.store is not None
        return self.store.current()

    async def _activate(self, checkpoint_id: str) -> Event:
        loaded = {engine.checkpoint_id or self.live.current.id for engine in self._engines.engines}
        if loaded == {checkpoint_id} == {self.live.current.id}:
            return self._note(
                checkpoint=checkpoint_id, outcome="serving", reason="it is served already"
            )
        self._check_known(checkpoint_id)
        await self._hold(checkpoint_id)
        try:
            new = await asyncio.to_thread(self._checked, checkpoint_id)
            seconds = await self._load(new)
        except (CheckpointError, OSError) as error:
            self._note(checkpoint=checkpoint_id, outcome="refused", reason=str(error))
            raise CheckpointError(f"{checkpoint_id} is not served: {error}") from error
        if new.id != self.live.current.id:
            self.live.previous, self.live.current = self.live.current, new
        await self._hold()
        return self._note(checkpoint=new.id, outcome="serving", reason="activated", seconds=seconds)

    def _check_known(self, checkpoint_id: str) -> None:
        known = self.store.ids() if self.store else []
        served = [c.id for c in (self.live.current, self.live.previous) if c is not None]
        if checkpoint_id not in (*known, *served):
            raise NotFound(
                f"there is no checkpoint {checkpoint_id[:100]!r}; the last ones of the store are: "
                f"{', '.join(known[-5:]) or 'none'}"
            )

    def _checked(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint, verified and fitting. Raises CheckpointError."""
        folder, manifest = self._verified(checkpoint_id)
        new = read_checkpoint(folder, max_model_len=self._max_model_len)
        self._probes[new.id] = manifest.probes if manifest else ()
        if wrong := differences(self.live.current.folder, folder):
            raise CheckpointError(
                f"it cannot be loaded in place of {self.live.current.id} ({'; '.join(wrong)}): "
                "start a server with it"
            )
        return new

    def _verified(self, checkpoint_id: str) -> tuple[Path, Manifest | None]:
        stored = self.store.ids() if self.store else []
        for known in (self.live.current, self.live.previous):
            if known is not None and checkpoint_id == known.id not in stored:
                return known.folder, None  # the one of the start need not be in the store
        if self.store is None:
            raise CheckpointError("no store was given; start the server with --store FOLDER")
        return self.store.folder_of(checkpoint_id), self.store.verify(checkpoint_id)

    async def _load(self, new: Checkpoint) -> dict[str, float]:
        """All engines or none: those that have changed go back when a later one fails."""
        old = self.live.current
        seconds: dict[str, float] = {}
        changed: list[RemoteEngine] = []
        try:
            for engine in self._engines.engines:
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
        return seconds

    async def _swap(self, engine: RemoteEngine, new: Checkpoint, old: Checkpoint) -> SwapReport:
        return await swap_in_place(
            engine,
            self._weights(new),
            self._weights(old),
            model=self._served_name,
            limits=self._limits,
        )

    def _weights(self, checkpoint: Checkpoint) -> Weights:
        return Weights(
            folder=checkpoint.folder,
            id=checkpoint.id,
            probes=self._probes.get(checkpoint.id, ()),
            process=None if self._process_of is None else self._process_of(checkpoint),
        )

    def _note(
        self,
        *,
        checkpoint: str,
        outcome: Outcome,
        reason: str,
        seconds: dict[str, float] | None = None,
    ) -> Event:
        if outcome == "serving":
            self.history = deque(
                (
                    replace(event, outcome="superseded") if event.outcome == "serving" else event
                    for event in self.history
                ),
                maxlen=_HISTORY,
            )
        event = Event(
            checkpoint=checkpoint,
            outcome=outcome,
            reason=reason,
            time_s=time.time(),
            seconds=seconds or {},
        )
        self.history.append(event)
        logger.info("checkpoint %s: %s, %s", checkpoint, outcome, reason)
        return event


def _complain_about(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("the store is followed no more", exc_info=error)


def differences(old: Path, new: Path) -> list[str]:
    """Why the weights of `new` cannot be loaded into an engine that runs `old`; empty if they can.

    Configuration and settings must be the same, and the tensors in names and shapes.
    """
    wrong = []
    if _configuration(old) != _configuration(new):
        wrong.append("config.json differs")
    for name in _SETTINGS:
        a, b = ((folder / name) for folder in (old, new))
        if (a.read_bytes() if a.exists() else None) != (b.read_bytes() if b.exists() else None):
            wrong.append(f"{name} differs")
    return wrong + weight_differences(old, new)


def _configuration(folder: Path) -> object:
    fields = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in fields.items() if key not in _FREE_KEYS}
