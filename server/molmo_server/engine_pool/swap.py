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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from molmo_core.checkpoint_store import Probe
from molmo_core.errors import CheckpointError, EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.remote import RemoteEngine
from molmo_server.engine_pool.supervisor import EngineProcess, SupervisedEngine

_N_ALTERNATIVES = 5


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
    if wrong := await _wrong_probes(engine, new, model, limits):
        outcome = await _put_back(engine, old, model, limits)
        raise CheckpointError(
            f"{new.id} was loaded and does not answer as published ({'; '.join(wrong)}); {outcome}"
        )


async def _put_back(engine: RemoteEngine, old: Weights, model: str, limits: SwapLimits) -> str:
    """Returns what came of it."""
    try:
        await engine.load_weights(old.folder, old.id, timeout_s=limits.load_s)
        if wrong := await _wrong_probes(engine, old, model, limits):
            raise EngineFailed(f"the old weights answer otherwise than before: {wrong}")
    except (EngineRefused, EngineFailed, EngineUnavailable) as error:
        await _begin_anew(engine, old)
        return f"{old.id} could not be put back ({error}), the engine has to start with it"
    return f"{old.id} was put back"


async def _begin_anew(engine: RemoteEngine, old: Weights) -> None:
    """Start the process again; until then the engine takes no requests, whatever it says."""
    engine.checkpoint_id = old.id
    engine.lose("its weights are unknown until it is started again")
    await engine.restart()


async def _wrong_probes(
    engine: RemoteEngine, weights: Weights, model: str, limits: SwapLimits
) -> list[str]:
    """What differs between the engine's answers and the published ones."""
    wrong = []
    for number, probe in enumerate(weights.probes):
        try:
            async with asyncio.timeout(limits.probe_s):
                tables = await _answer(engine, probe, model)
        except (EngineRefused, EngineFailed, EngineUnavailable, TimeoutError) as error:
            wrong.append(f"probe {number} was not answered: {error or 'it took too long'}")
            continue
        if why := compare_probe(probe, tables, limits.tolerance):
            wrong.append(f"probe {number}: {why}")
    return wrong


def compare_probe(
    probe: Probe, tables: Sequence[Mapping[int, float | None]], tolerance: float
) -> str | None:
    """Why an answer is not the published one, None when it is.

    `tables`: for each token of the answer the log-probabilities of the most probable ids, the
    chosen one first. The published token's is compared, whatever was chosen: two that are as
    probable may change places. Behind another choice the answers are about different texts.
    """
    for place, (expected, published) in enumerate(
        zip(probe.answer_ids, probe.logprobs, strict=True)
    ):
        if place >= len(tables):
            return f"it ends after {len(tables)} tokens, published are {len(probe.answer_ids)}"
        table = tables[place]
        got = table.get(expected)
        if got is None or not math.isfinite(got):
            return f"token {place} is {next(iter(table), None)}, published is {expected}"
        if abs(got - published) > tolerance:
            return f"the log-probability of token {place} is {got:.4f}, published {published:.4f}"
        if next(iter(table)) != expected:
            return None
    return None


async def _answer(engine: RemoteEngine, probe: Probe, model: str) -> list[dict[int, float | None]]:
    """For each token: id → log-probability, the chosen one first. Raises EngineFailed."""
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
        "top_logprobs": _N_ALTERNATIVES,
        "return_tokens_as_token_ids": True,
    }
    asked = engine.open(orjson.dumps(body), request_id=f"probe-{engine.name}", whole=True)
    async with asked as reply:
        try:
            tokens = orjson.loads(reply.first)["choices"][0]["logprobs"]["content"]
            return [
                {
                    int(one["token"].removeprefix("token_id:")): one["logprob"]
                    for one in (token, *token["top_logprobs"])
                }
                for token in tokens
            ]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineFailed(f"the answer cannot be read ({error!r})") from error
