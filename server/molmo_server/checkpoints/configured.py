"""Store, first checkpoint and plan of changes, as the service's settings ask for them.

Knows: names of settings. Does not know: what is done with the result.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from molmo_core.checkpoints import Store, open_store
from molmo_core.errors import CheckpointError
from molmo_server.checkpoints.blue_green import Examination
from molmo_server.checkpoints.every_engine import RolloutPlan
from molmo_server.checkpoints.fit import check_mask
from molmo_server.checkpoints.folder import Checkpoint, read_checkpoint
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_server.engine_pool.probing import ProbeLimits
from molmo_server.engine_pool.swap import SwapLimits
from molmo_server.settings import MolmoSettings

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]


def open_local(settings: MolmoSettings) -> tuple[Store | None, LocalCheckpoints | None]:
    """The store, and its checkpoints on this machine; nothing without one."""
    if settings.store is None:
        return None, None
    store = open_store(settings.store, cache=settings.cache_dir / "store")
    return store, LocalCheckpoints(store, settings.cache_dir)


def first_checkpoint(settings: MolmoSettings, tell: Tell = logger.info) -> Checkpoint:
    """What is served at the start; a store's pointer is read, so ask once. Raises CheckpointError.

    May download and convert: takes minutes then, and `tell` hears how far it is.
    """
    return read_checkpoint(_first_folder(settings, tell), max_model_len=settings.max_model_len)


def _first_folder(settings: MolmoSettings, tell: Tell) -> Path:
    if settings.checkpoint is not None:
        return settings.checkpoint
    store, local = open_local(settings)
    if store is not None and local is not None and (current := store.current()) is not None:
        return _first_in_order(store, local, current, tell)
    return Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))


def _first_in_order(store: Store, local: LocalCheckpoints, current: str, tell: Tell) -> Path:
    """The current one, or the latest before it when that is damaged: something is to be served.

    Raises CheckpointError about the current one when none is in order, OSError.
    """
    ids = store.ids()
    older = ids[: ids.index(current)] if current in ids else ids
    failure: CheckpointError | None = None
    for one in (current, *reversed(older)):
        try:
            folder, manifest = local.bring(one, _Briefly(one, tell))
            check_mask(folder, manifest)
            return folder
        except CheckpointError as error:
            tell(f"molmo: {one} cannot be served: {error.message}")
            failure = failure or error
    assert failure is not None, "at least the current one was tried"
    raise failure


class _Briefly:
    """Passes on that a phase begins, not how far it is."""

    def __init__(self, checkpoint_id: str, tell: Tell) -> None:
        self._checkpoint_id, self._tell, self._told = checkpoint_id, tell, ""

    def __call__(self, phase: str) -> None:
        name = phase.partition(",")[0]
        if name != self._told:
            self._tell(f"molmo: {name} {self._checkpoint_id}")
        self._told = name


def rollout_plan(settings: MolmoSettings, address: str) -> RolloutPlan:
    """`address`: where a gate finds the service."""
    return RolloutPlan(
        served_name=settings.served_name,
        max_model_len=settings.max_model_len,
        way=settings.swap_way,
        limits=SwapLimits(
            drain_s=settings.swap_drain_s,
            load_s=settings.swap_load_s,
            probes=ProbeLimits(tolerance=settings.probe_tolerance),
        ),
        leave_s=max(settings.swap_drain_s, settings.deadline_s),
        examination=Examination(
            gate=tuple(shlex.split(settings.gate_command)),
            gate_s=settings.gate_s,
            address=address,
            share=settings.canary_share,
            shadow_share=settings.shadow_share,
            canary_s=settings.canary_s,
            least_same=settings.least_same,
        ),
    )
