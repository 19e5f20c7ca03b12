"""Other weights under a running engine, with nothing dropped and nothing half-loaded served.

The engine takes no new requests, those in flight end on the weights they began with, it loads,
resets what was computed with the old weights, answers the probes of the new checkpoint as their
publisher computed them, and only then takes requests again. Whatever goes wrong ends with the old
weights: put back in place, or by starting the process anew.

Knows: the order of the steps and what each failure means. Does not know: where checkpoints come
from, whether they fit (`molmo_server.checkpoints.rollout`). Source: vLLM's behaviour as tried in
docs/fidelity.md and serving notes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from molmo_core.checkpoint_store import Probe
from molmo_core.errors import CheckpointError, EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.remote import RemoteEngine
from molmo_server.engine_pool.supervisor import EngineProcess, SupervisedEngine

logger = logging.getLogger(__name__)


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
    probe_s: float = 60.0
    tolerance: float = 1e-2
    """Of a probe's log-probability, in nats: float32 engines stay below 1e-3, 16 bits need more."""


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """Seconds of each phase of a swap that succeeded."""

    seconds: dict[str, float] = field(default_factory=dict)


async def swap_in_place(
    engine: RemoteEngine, new: Weights, old: Weights, *, model: str, limits: SwapLimits
) -> SwapReport:
    """Have `engine` serve `new` instead of `old`; `model` is the name it serves under.

    Raises CheckpointError saying why not; the engine then serves `old`, or is starting with it.
    """
    clock = asyncio.get_running_loop().time
    seconds: dict[str, float] = {}
    engine.hold(f"loading {new.id}")
    try:
        began = clock()
        if not await engine.drained(limits.drain_s):
            raise CheckpointError(
                f"{engine.n_in_flight} requests were still in flight after {limits.drain_s:g} s; "
                "nothing was loaded: activate it again when there is less to do"
            )
        seconds["drain"] = clock() - began
        began = clock()
        try:
            await engine.load_weights(new.folder, new.id, timeout_s=limits.load_s)
        except EngineRefused as error:
            raise CheckpointError(
                f"the engine could not load {new.id} and serves {old.id} again: {error.message}"
            ) from error
        except (EngineFailed, EngineUnavailable) as error:
            await _begin_anew(engine, old)
            raise CheckpointError(
                f"the engine was lost while loading {new.id} and is starting with {old.id}: "
                f"{error.message}"
            ) from error
        seconds["load"] = clock() - began
        began = clock()
        if wrong := await _wrong_probes(engine, new, model, limits):
            await _put_back(engine, old, model, limits)
            raise CheckpointError(
                f"{new.id} was loaded and does not answer as published ({'; '.join(wrong)}); "
                f"{old.id} serves again"
            )
        seconds["probe"] = clock() - began
        if isinstance(engine, SupervisedEngine) and new.process is not None:
            engine.adopt(new.process)
        return SwapReport(seconds={name: round(value, 4) for name, value in seconds.items()})
    finally:
        engine.release()


async def _put_back(engine: RemoteEngine, old: Weights, model: str, limits: SwapLimits) -> None:
    try:
        await engine.load_weights(old.folder, old.id, timeout_s=limits.load_s)
        if wrong := await _wrong_probes(engine, old, model, limits):
            raise EngineFailed(f"the old weights answer otherwise than before: {wrong}")
    except (EngineRefused, EngineFailed, EngineUnavailable) as error:
        logger.error("engine %s: %s could not be put back: %s", engine.name, old.id, error)
        await _begin_anew(engine, old)


async def _begin_anew(engine: RemoteEngine, old: Weights) -> None:
    """Start the process again; until then the engine takes no requests, whatever it says."""
    engine.checkpoint_id = old.id
    engine.lose("its weights are unknown; it starts anew")
    await engine.restart()


async def _wrong_probes(
    engine: RemoteEngine, weights: Weights, model: str, limits: SwapLimits
) -> list[str]:
    """What differs between the engine's answers and the published ones."""
    wrong = []
    for number, probe in enumerate(weights.probes):
        began = time.monotonic()
        try:
            async with asyncio.timeout(limits.probe_s):
                ids, logprobs = await _answer(engine, probe, model)
        except (EngineRefused, EngineFailed, EngineUnavailable, TimeoutError) as error:
            wrong.append(f"probe {number} was not answered: {error or 'it took too long'}")
            continue
        if why := compare_probe(probe, ids, logprobs, limits.tolerance):
            wrong.append(f"probe {number}: {why}")
        logger.debug("probe %d took %.3f s", number, time.monotonic() - began)
    return wrong


def compare_probe(
    probe: Probe, ids: Sequence[int], logprobs: Sequence[float | None], tolerance: float
) -> str | None:
    """Why an answer is not the published one, None when it is.

    Tokens are compared one by one up to the first other choice, which is excused when both
    choices are as probable: behind it the answers are about different texts.
    """
    for place, (expected, log_expected) in enumerate(
        zip(probe.answer_ids, probe.logprobs, strict=True)
    ):
        if place >= len(ids):
            return f"the answer ends after {len(ids)} tokens, published are {len(probe.answer_ids)}"
        got = logprobs[place]
        if got is None or not math.isfinite(got):
            return f"the log-probability of token {place} is {got}"
        if abs(got - log_expected) > tolerance:
            return (
                f"the log-probability of token {place} is {got:.4f}, published {log_expected:.4f}"
            )
        if ids[place] != expected:
            return None
    return None


async def _answer(
    engine: RemoteEngine, probe: Probe, model: str
) -> tuple[list[int], list[float | None]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": probe.question}]
    if probe.image_png is not None:
        url = f"data:image/png;base64,{probe.image_png}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": len(probe.answer_ids),
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
    }
    asked = engine.open(orjson.dumps(body), request_id=f"probe-{engine.name}", whole=True)
    async with asked as reply:
        choice = orjson.loads(reply.first)["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return choice.get("token_ids") or [], [token.get("logprob") for token in tokens]
