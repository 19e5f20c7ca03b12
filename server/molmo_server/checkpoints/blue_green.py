"""A second engine with another checkpoint: started beside the first, examined, then in its place.

The one that serves goes on until the other has started, has answered its probes, has passed the
gate and has been tried on callers, whichever of these was asked for. What fails ends the second
one and nothing else. Of several engines one is exchanged at a time.

Knows: the order of the examinations and what each failure means. Does not know: how engines start
(`engine_pool`), whether there is memory for two (`fit`).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from molmo_core.checkpoints import Probe
from molmo_core.errors import CheckpointError
from molmo_server.engine_pool import (
    EnginePool,
    EngineState,
    RemoteEngine,
    SupervisedEngine,
    Trial,
)
from molmo_server.engine_pool.probing import ProbeLimits, wrong_probes
from molmo_server.engine_pool.trial import TrialFigures

_LOOK_S = 0.1
_LAST_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a second engine has to pass before it takes the place of the first."""

    gate: tuple[str, ...] = ()
    """A command; another exit code than 0 refuses the checkpoint."""
    gate_s: float = 3600.0
    address: str = ""
    """Where the gate finds this service."""
    share: float = 0.0
    """Of callers' requests that it answers during the canary."""
    shadow_share: float = 0.0
    """Of callers' greedy answers in one piece that it gives as well during the canary."""
    canary_s: float = 60.0
    least_same: float = 0.0
    """Of compared answers, this share must be equal."""

    @property
    def has_canary(self) -> bool:
        return self.share > 0 or self.shadow_share > 0

    @property
    def is_demanded(self) -> bool:
        """Whether something is to be examined that only a second engine can show."""
        return bool(self.gate) or self.has_canary


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What an exchange that succeeded took and showed."""

    seconds: dict[str, float]
    canary: dict[str, Any] = field(default_factory=dict)


async def exchange(
    engines: EnginePool,
    engine: SupervisedEngine,
    probes: tuple[Probe, ...],
    examination: Examination,
    *,
    model: str,
    current_id: str,
    replaced: RemoteEngine,
    limits: ProbeLimits,
    drain_s: float,
    on_phase: Callable[[str], None],
    on_chosen: Callable[[], None],
) -> Exchange:
    """Start `engine` and put it in the place of `replaced`, which then finishes and leaves.

    `on_chosen` is called in the same moment. Raises CheckpointError saying why not; those that
    serve then serve as before.
    """
    clock = asyncio.get_running_loop().time
    seconds: dict[str, float] = {}
    is_chosen = False
    trial = await engines.try_out(engine)
    try:
        examinations: dict[str, Callable[[], Awaitable[None]]] = {
            "starting a second engine": partial(_started, engine),
            "gate": partial(_passes_gate, trial, examination, current_id),
            "canary": partial(_tried_on_callers, trial, examination),
            "probes": partial(_answers_still, engine, probes, model, limits),
        }
        for phase, examine in examinations.items():
            on_phase(phase)
            began = clock()
            await examine()
            seconds[phase] = round(clock() - began, 4)
            if engine.state is not EngineState.READY or engine.n_restarts:
                raise CheckpointError(f"the second engine did not last: {engine.reason}")
        is_chosen = True
        on_chosen()
    finally:
        engines.end_trial(replaced=replaced if is_chosen else None, drain_s=drain_s)
    canary = trial.figures.as_dict() if examination.has_canary else {}
    return Exchange(seconds=seconds, canary=canary)


async def _started(engine: SupervisedEngine) -> None:
    await engine.settled.wait()
    if engine.state is not EngineState.READY:
        lines = [line for line in engine.log_tail(60).splitlines() if "Error" in line]
        last = f" ({lines[-1].strip()[-_LAST_CHARS:]})" if lines else ""
        raise CheckpointError(f"a second engine did not start with it: {engine.reason}{last}")


async def _answers_still(
    engine: SupervisedEngine, probes: tuple[Probe, ...], model: str, limits: ProbeLimits
) -> None:
    """The probes were part of the start; what came since may have hurt."""
    if wrong := await wrong_probes(engine, probes, model, limits):
        raise CheckpointError(
            f"in the end a second engine did not answer as published ({'; '.join(wrong)})"
        )


async def _passes_gate(trial: Trial, examination: Examination, current_id: str) -> None:
    """The command finds the engine on trial under the name of its checkpoint."""
    if not examination.gate:
        return
    trial.is_open = True
    inherited = {k: v for k, v in os.environ.items() if k != "MOLMO_ADMIN_KEY"}
    environment = {
        "MOLMO_SERVER": examination.address,
        "MOLMO_GATE_CANDIDATE": trial.engine.checkpoint_id,
        "MOLMO_GATE_CURRENT": current_id,
    }
    try:
        child = await asyncio.create_subprocess_exec(
            *examination.gate,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**inherited, **environment},
            start_new_session=True,
        )
    except OSError as error:
        raise CheckpointError(
            f"the gate {examination.gate[0]!r} cannot be run ({error})"
        ) from error
    try:
        async with asyncio.timeout(examination.gate_s):
            output, _ = await child.communicate()
    except TimeoutError as error:
        raise CheckpointError(f"the gate took longer than {examination.gate_s:g} s") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
    if child.returncode != 0:
        said = " ".join(output.decode(errors="replace").split())[-_LAST_CHARS:]
        raise CheckpointError(f"the gate ended with exit code {child.returncode}: {said}")


async def _tried_on_callers(trial: Trial, examination: Examination) -> None:
    if not examination.has_canary:
        return
    clock = asyncio.get_running_loop().time
    figures = trial.figures = TrialFigures()  # without what the gate asked
    trial.share, trial.shadow_share = examination.share, examination.shadow_share
    trial.is_open = True
    end = clock() + examination.canary_s
    while clock() < end and not figures.n_failed and not trial.engine.n_restarts:
        await asyncio.sleep(_LOOK_S)
    if figures.n_failed:
        raise CheckpointError(f"it broke on callers' requests during the canary: {_shown(trial)}")
    if figures.n_asked and not figures.trial_s:
        raise CheckpointError(f"it answered no caller during the canary: {_shown(trial)}")
    if examination.least_same and not figures.n_compared:
        raise CheckpointError(
            "nothing could be compared during the canary: no greedy answer in one piece was asked "
            "for; make MOLMO_CANARY_S longer, or leave MOLMO_LEAST_SAME out"
        )
    if figures.n_same < examination.least_same * figures.n_compared:
        raise CheckpointError(
            f"it answered otherwise than {examination.least_same:.0%} of the compared answers "
            f"allow: {_shown(trial)}"
        )


def _shown(trial: Trial) -> str:
    figures = trial.figures
    return (
        f"{len(figures.trial_s)} answered, {figures.n_failed} failed, "
        f"{figures.n_same} of {figures.n_compared} the same"
    )
