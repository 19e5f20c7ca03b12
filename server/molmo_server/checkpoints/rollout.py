"""How another checkpoint comes to be served.

A rollout brings a checkpoint to this machine, checks it against what is running, chooses the way
(the weights in place under every engine, or a second engine beside each) and remembers what
happened. What fails leaves the old one serving, with the reason in the history.

Knows: the order, and which way fits. Does not know: where checkpoints come from (`local`), how
engines get them (`every_engine`), who asks (`following`, the routes).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

from molmo_core.checkpoints import MANIFEST, Probe, Store, read_manifest
from molmo_core.errors import Busy, CheckpointError, NotFound
from molmo_server.checkpoints.blue_green import Exchange
from molmo_server.checkpoints.every_engine import EveryEngine, RolloutPlan
from molmo_server.checkpoints.fit import check_mask, differences, lack_of_memory
from molmo_server.checkpoints.folder import Checkpoint, read_checkpoint
from molmo_server.checkpoints.live import Event, History, LiveCheckpoint
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_server.engine_pool import EnginePool, SupervisedEngine
from molmo_server.engine_pool.swap import NotNow
from molmo_server.engines import OwnEngines


class Rollout:
    """Changes of checkpoint, one at a time."""

    def __init__(
        self,
        plan: RolloutPlan,
        *,
        live: LiveCheckpoint,
        engines: EnginePool,
        store: Store | None,
        local: LocalCheckpoints | None,
        own: OwnEngines | None,
    ) -> None:
        """`own` makes engines whose processes are ours; None: all are run by others."""
        self.live, self.store, self.history = live, store, History()
        self.phase = ""
        """What is being done for the checkpoint that is loading."""
        self.loading = ""
        self.on_change: Callable[[], Awaitable[None]] = _nobody_to_tell
        """Awaited when other checkpoints are to be kept than before."""
        self._plan, self._engines, self._local, self._own = plan, engines, local, own
        self._lock = asyncio.Lock()
        self._probes: dict[str, tuple[Probe, ...]] = {}
        self._every_engine = EveryEngine(
            plan,
            live=live,
            engines=engines,
            own=own,
            probes=self._probes,
            on_phase=self._note_phase,
        )
        if (live.current.folder / MANIFEST).exists():
            self._probes[live.current.id] = read_manifest(live.current.folder).probes

    @property
    def is_loading(self) -> bool:
        return self._lock.locked()

    def held_ids(self) -> set[str]:
        """What must not be removed from the store."""
        known = (self.live.current, self.live.previous)
        return {c.id for c in known if c is not None} | ({self.loading} - {""})

    def states(self) -> list[dict[str, str | None]]:
        """Of every stored and every served checkpoint, the oldest first: id, state, reason.

        May read an object store: call it in a thread. Raises CheckpointError, OSError.
        """
        stored = self.store.ids() if self.store else []
        ids = [*sorted(self.held_ids() - set(stored)), *stored]
        return [{"id": one, **self._state(one)} for one in ids]

    def _state(self, checkpoint_id: str) -> dict[str, str | None]:
        refusal = self.history.last_refusal(checkpoint_id)
        if checkpoint_id == self.loading:
            return {"state": "loading", "reason": self.phase}
        if checkpoint_id == self.live.current.id:
            return {"state": "serving", "reason": None}
        return {"state": "refused" if refusal else "stored", "reason": refusal}

    async def activate(self, checkpoint_id: str) -> Event:
        """Serve a checkpoint of the store.

        Raises Busy while another change is going on, NotFound, and CheckpointError with the
        reason why the old one still serves.
        """
        async with self.unchanged():
            try:
                return await self._activate(checkpoint_id)
            finally:
                self.loading = self.phase = ""

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """No change begins in the block. Raises Busy while one is going on."""
        if self._lock.locked():
            raise Busy("another checkpoint is being loaded; try again when it is done")
        async with self._lock:
            yield

    async def roll_back(self) -> Event:
        """Serve what was served before. Raises as `activate`."""
        if self.live.previous is None:
            raise NotFound("nothing else was served since the start; there is no way back")
        return await self.activate(self.live.previous.id)

    async def _activate(self, checkpoint_id: str) -> Event:
        loaded = {engine.checkpoint_id or self.live.current.id for engine in self._engines.engines}
        if loaded == {checkpoint_id} == {self.live.current.id}:
            return self.history.note(checkpoint_id, "serving", "it is served already")
        self.loading = checkpoint_id
        try:
            await asyncio.to_thread(self._check_known, checkpoint_id)
            await self.on_change()
            new = await asyncio.to_thread(self._brought, checkpoint_id)
            way = self._chosen_way(await asyncio.to_thread(self._obstacles, new))
            if way == "in_place":
                done = Exchange(seconds=await self._every_engine.load(new))
            else:
                done = await self._every_engine.exchange(new)
        except (CheckpointError, OSError) as error:
            self.history.note(checkpoint_id, "refused", str(error))
            raise CheckpointError(f"{checkpoint_id} is not served: {error}") from error
        self.loading = ""
        await self.on_change()
        reason = "activated in place" if way == "in_place" else "activated on a second engine"
        return self.history.note(
            new.id, "serving", reason, seconds=done.seconds, canary=done.canary
        )

    # --- what is to be loaded -------------------------------------------------------------------

    def _check_known(self, checkpoint_id: str) -> None:
        served = [c.id for c in (self.live.current, self.live.previous) if c is not None]
        if checkpoint_id in served or (self.store and self.store.has(checkpoint_id)):
            return
        known = self.store.ids() if self.store else []
        raise NotFound(
            f"there is no checkpoint {checkpoint_id[:100]!r}; the last ones of the store are: "
            f"{', '.join(known[-5:]) or 'none'}"
        )

    def _brought(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint on this machine, verified. Raises CheckpointError, OSError."""
        for served in (self.live.current, self.live.previous):
            is_packaged = served is not None and not (served.folder / MANIFEST).exists()
            if served is not None and is_packaged and served.id == checkpoint_id:
                return served  # nothing was published to compare it with
        if self._local is None:
            raise CheckpointError("no store was given; start the server with --store")
        folder, manifest = self._local.bring(checkpoint_id, self._note_phase)
        new = read_checkpoint(folder, max_model_len=self._plan.max_model_len)
        self._probes[new.id] = manifest.probes
        check_mask(folder, manifest)
        return new

    def _note_phase(self, phase: str) -> None:
        self.phase = phase

    # --- the way --------------------------------------------------------------------------------

    def _obstacles(self, new: Checkpoint) -> list[str]:
        """Why its weights cannot be loaded into the running engines. Raises CheckpointError."""
        return differences(self.live.current.folder, new.folder)

    def _chosen_way(self, obstacles: list[str]) -> Literal["in_place", "blue_green"]:
        """Raises CheckpointError when neither fits."""
        wanted, examination = self._plan.way, self._plan.examination
        needs_second = wanted == "blue_green" or bool(obstacles) or examination.is_demanded
        if not needs_second:
            return "in_place"
        why = (
            f"it cannot be loaded in place of {self.live.current.id} ({'; '.join(obstacles)})"
            if obstacles
            else "a second engine is asked for, by MOLMO_SWAP_WAY, a gate or a canary"
        )
        if wanted == "in_place":
            raise CheckpointError(f"{why}, and MOLMO_SWAP_WAY is in_place: start a server with it")
        if lack := self._lack_of_second_engine():
            raise CheckpointError(f"{why}, and {lack}: start a server with it")
        if lack := self._lack_of_memory():
            raise NotNow(f"{why}, and {lack}: end another program, or start a server with it")
        return "blue_green"

    def _lack_of_second_engine(self) -> str | None:
        engines = self._engines.engines
        if self._own is None or not all(isinstance(e, SupervisedEngine) for e in engines):
            return "an engine is run by others"
        return None

    def _lack_of_memory(self) -> str | None:
        """Whoever asks for a second engine by name knows that there is memory for it."""
        pids = [e.pid for e in self._engines.engines if isinstance(e, SupervisedEngine) and e.pid]
        if self._plan.way == "blue_green" or not pids:
            return None
        return lack_of_memory(pids[0])


async def _nobody_to_tell() -> None:
    """Without a store nothing is kept for anyone."""
