"""Other weights under a running engine, with nothing dropped and nothing half-loaded served.

The engine takes no new requests, those in flight end on the weights they began with, it loads,
resets what was computed with the old weights, answers the probes of the new checkpoint as their
publisher computed them, and only then takes requests again. Whatever goes wrong ends with the old
weights: put back in place, or by starting the process anew.

Knows: the order of the steps and what each failure means. Does not know: where checkpoints come
from, whether they fit (`molmo_server.checkpoints.rollout`). Source: vLLM's behaviour as tried in
tests/server/engine/test_engine_swap.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from molmo_core.checkpoints import Probe
from molmo_core.errors import CheckpointError, EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.probing import ProbeLimits, wrong_probes
from molmo_server.engine_pool.remote import RemoteEngine
from molmo_server.engine_pool.supervisor import EngineProcess, SupervisedEngine


class NotNow(CheckpointError):
    """Nothing was tried: the engine was not to be had. Worth another try later."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What an engine is to load, or has."""

    folder: Path
    id: str
    probes: tuple[Probe, ...] = ()
    process: EngineProcess | None = None
    """How an engine of ours starts with them."""


@dataclass(frozen=True, kw_only=True)
class SwapLimits:
    drain_s: float = 120.0
    """How long requests in flight may go on before the swap is given up."""
    load_s: float = 600.0
    probes: ProbeLimits = field(default_factory=ProbeLimits)


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """Seconds of each phase of a swap that succeeded."""

    seconds: dict[str, float] = field(default_factory=dict)


async def swap_in_place(
    engine: RemoteEngine, new: Weights, old: Weights, *, model: str, limits: SwapLimits
) -> SwapReport:
    """Have `engine` serve `new` instead of `old`; `model` is the name it serves under.

    Raises CheckpointError saying why not; the engine then has `old`, or has to start with it and
    takes no requests until it did.
    """
    if isinstance(engine, SupervisedEngine) and new.process is None:
        raise ValueError("an engine of ours must be told how it starts with the new weights")
    clock = asyncio.get_running_loop().time
    seconds: dict[str, float] = {}
    began = clock()
    await _wait_until_ready(engine, limits.drain_s)
    engine.hold(f"loading {new.id}")
    try:
        if not await engine.drained(limits.drain_s):
            raise NotNow(
                f"{engine.n_in_flight} requests were still in flight after {limits.drain_s:g} s; "
                "nothing was loaded"
            )
        seconds["drain"] = clock() - began
        began = clock()
        try:
            await _load_and_check(engine, new, old, model, limits)
        except CheckpointError:
            raise
        except BaseException:  # cancelled, or a fault of ours: what is loaded is not known
            await _begin_anew(engine, old)
            raise
        seconds["load"] = clock() - began
        if isinstance(engine, SupervisedEngine) and new.process is not None:
            engine.adopt(new.process)
        return SwapReport(seconds={name: round(value, 4) for name, value in seconds.items()})
    finally:
        engine.release()


def load_when_it_comes(engine: RemoteEngine, new: Weights) -> None:
    """For an engine that is away: its next start is with `new`, or it takes no requests."""
    engine.expect(new.id)
    if isinstance(engine, SupervisedEngine) and new.process is not None:
        engine.adopt(new.process)


async def _wait_until_ready(engine: RemoteEngine, limit_s: float) -> None:
    """Raises NotNow: an engine that is starting would be killed by a load that fails."""
    try:
        async with asyncio.timeout(limit_s):
            await engine.ready.wait()
    except TimeoutError as error:
        raise NotNow(
            f"engine {engine.name} is {engine.state.value}: {engine.reason}; nothing was loaded"
        ) from error


async def _load_and_check(
    engine: RemoteEngine, new: Weights, old: Weights, model: str, limits: SwapLimits
) -> None:
    """Raises CheckpointError when the engine has, or is starting with, its old weights."""
    try:
        await engine.load_weights(new.folder, new.id, timeout_s=limits.load_s)
    except EngineRefused as error:
        raise CheckpointError(
            f"the engine could not load {new.id} and has {old.id} again: {error.message}"
        ) from error
    except (EngineFailed, EngineUnavailable) as error:
        await _begin_anew(engine, old)
        raise CheckpointError(
            f"the engine was lost while loading {new.id} and has to start with {old.id}: "
            f"{error.message}"
        ) from error
    if wrong := await wrong_probes(engine, new.probes, model, limits.probes):
        outcome = await _put_back(engine, old, model, limits)
        raise CheckpointError(
            f"{new.id} was loaded and does not answer as published ({'; '.join(wrong)}); {outcome}"
        )


async def _put_back(engine: RemoteEngine, old: Weights, model: str, limits: SwapLimits) -> str:
    """Returns what came of it."""
    try:
        await engine.load_weights(old.folder, old.id, timeout_s=limits.load_s)
        if wrong := await wrong_probes(engine, old.probes, model, limits.probes):
            raise EngineFailed(f"the old weights answer otherwise than before: {wrong}")
    except (EngineRefused, EngineFailed, EngineUnavailable) as error:
        await _begin_anew(engine, old)
        return f"{old.id} could not be put back ({error}), the engine has to start with it"
    return f"{old.id} was put back"


async def _begin_anew(engine: RemoteEngine, old: Weights) -> None:
    """Start the process again; until then the engine takes no requests, whatever it says."""
    engine.expect(old.id)
    engine.lose("its weights are unknown until it is started again")
    await engine.restart()
