"""Following a store: what becomes current there is served, and the store is told what is served.

Knows: the store's pointer and leases. Does not know: how a checkpoint comes to be served.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator

from watchfiles import awatch

from molmo_core.checkpoints import FolderStore, Store
from molmo_core.errors import Busy, CheckpointError, NotFound
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_server.checkpoints.rollout import Rollout
from molmo_server.engine_pool.swap import NotNow

logger = logging.getLogger(__name__)

_POLL_S, _LONGEST_PAUSE_S, _HOLD_EVERY_S = 1.0, 60.0, 60.0


class StoreFollower:
    def __init__(
        self, rollout: Rollout, store: Store, local: LocalCheckpoints, *, loads: bool
    ) -> None:
        """`loads` False: only the leases are kept."""
        self._rollout, self._store, self._loads = rollout, store, loads
        self._heard: str | None = None
        self._pause_s = _POLL_S
        self._holder = f"{socket.gethostname()}-{os.getpid()}"
        self._local = local
        rollout.on_change = self.hold

    def start(self) -> list[asyncio.Task[None]]:
        """The tasks that follow until they are cancelled."""
        tasks = [asyncio.create_task(self.keep_lease())]
        if self._loads:
            tasks.append(asyncio.create_task(self.follow()))
        for task in tasks:
            task.add_done_callback(_complain_about)
        return tasks

    async def follow(self) -> None:
        """Follow the store's pointer until cancelled.

        What was refused is not tried again before the pointer has moved; what only could not be
        tried now is, after a pause that grows.
        """
        self._heard = self._rollout.live.current.id
        told = ""
        async for _ in self._looks():
            try:
                wanted = await asyncio.to_thread(self._store.current)
                told = ""
            except (CheckpointError, OSError) as error:
                if told != str(error):
                    self._rollout.history.note("?", "refused", str(error))
                told = str(error)
                continue
            if wanted is None or wanted == self._heard or self._rollout.is_loading:
                continue
            try:
                await self._load(wanted)
            except Exception:
                logger.exception("the store's current checkpoint %s is not served", wanted)
                self._heard = wanted

    async def _load(self, wanted: str) -> None:
        self._heard = wanted
        if wanted == self._rollout.live.current.id:
            return
        try:
            await self._rollout.activate(wanted)
            self._pause_s = _POLL_S
        except Busy:
            self._heard = None
        except (CheckpointError, NotFound) as error:
            logger.error("the store's current checkpoint is not served: %s", error)
            if isinstance(error.__cause__, (NotNow, OSError)):
                await asyncio.sleep(self._pause_s)
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                self._heard = None

    async def keep_lease(self) -> None:
        """Tell the store what is served, until cancelled, so that retention leaves it alone."""
        try:
            while True:
                await self.hold()
                await asyncio.sleep(_HOLD_EVERY_S)
        finally:
            self._store.release(self._holder)

    async def hold(self) -> None:
        """A store that cannot be written to is served from all the same."""
        held = self._rollout.held_ids()
        try:
            await asyncio.to_thread(self._store.hold, self._holder, held)
            await asyncio.to_thread(self._local.tidy, held)
        except OSError as error:
            logger.warning("the store cannot be told what is served: %s", error)

    async def _looks(self) -> AsyncIterator[None]:
        """One at least every second; for a folder also as soon as something in it changes."""
        if isinstance(self._store, FolderStore) and self._store.folder.is_dir():
            async for _ in awatch(
                self._store.folder,
                recursive=False,
                debounce=50,
                step=10,
                rust_timeout=int(_POLL_S * 1000),
                yield_on_timeout=True,
            ):
                yield
        while True:
            await asyncio.sleep(_POLL_S)
            yield


def _complain_about(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("the store is followed no more", exc_info=error)
