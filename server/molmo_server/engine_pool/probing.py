"""Whether an engine answers a checkpoint's probes as their publisher computed them.

Knows: what is asked, which differences are none. Does not know: what follows from a difference.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from molmo_core.checkpoints import Probe
from molmo_core.errors import EngineFailed, EngineRefused, EngineUnavailable
from molmo_server.engine_pool.remote import RemoteEngine

_N_ALTERNATIVES = 5
_ANYTHING = Probe(question="What can you do?", answer_ids=(), logprobs=())
_N_TOKENS_OF_ANYTHING = 4


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    answer_s: float = 60.0
    """How long one answer may take."""
    tolerance: float = 1e-2
    """Of a log-probability, in nats: float32 engines stay below 1e-3, 16 bits need more."""


async def wrong_probes(
    engine: RemoteEngine, probes: Sequence[Probe], model: str, limits: ProbeLimits
) -> list[str]:
    """What differs between the engine's answers and the published ones.

    Without published ones the answer to one question must at least be made of numbers.
    """
    wrong = []
    for number, probe in enumerate(probes or (_ANYTHING,)):
        try:
            async with asyncio.timeout(limits.answer_s):
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
    probable may change places. Behind another choice the answers are about different texts. A
    probe without an answer asks for numbers only.
    """
    if not probe.answer_ids:
        chosen = [next(iter(table.values()), None) for table in tables]
        is_good = chosen and all(one is not None and math.isfinite(one) for one in chosen)
        return None if is_good else f"the log-probabilities of its answer are {chosen}"
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
        "max_tokens": len(probe.answer_ids) or _N_TOKENS_OF_ANYTHING,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": _N_ALTERNATIVES,
        "return_tokens_as_token_ids": True,
    }
    asked = engine.open(orjson.dumps(body), request_id=f"probe-{engine.name}", whole=True)
    with await asked as reply:
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
