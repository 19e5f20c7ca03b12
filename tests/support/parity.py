"""Compare an engine with the reference over one conversation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from molmo_server.media.options import engine_fields
from tests.support.conversations import Conversation
from tests.support.engine import EngineRefusal, RunningEngine
from tests.support.reference import Reference

TOLERANCE = 2e-4
"""Largest difference of a log-probability in float32 (nats)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine said: ids, and the log-probability of each id given what precedes it."""

    prompt_ids: list[int]
    prompt_logprobs: list[float] | None
    """From the second token on; None where they were not asked for."""
    ids: list[int]
    logprobs: list[float]
    n_cached: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Engine against reference."""

    prompt_ids_equal: bool
    prompt: float
    """Largest |Δ| over the prompt's base-vocabulary tokens."""
    answer: float
    """Largest |Δ| over the generated tokens."""
    greedy_equal: bool

    @property
    def largest(self) -> float:
        return max(self.prompt, self.answer)


def ask(
    engine: RunningEngine,
    conversation: Conversation,
    *,
    n_steps: int,
    with_prompt: bool = True,
    **fields: Any,
) -> Answer:
    """Greedy answer of exactly `n_steps` tokens; without the prompt's values the cache is read."""
    if with_prompt:
        fields["prompt_logprobs"] = 0
    if conversation.subtitles:
        fields["chat_template_kwargs"] = {"subtitles": conversation.subtitles}
    body = engine.chat(
        conversation.messages(),
        max_tokens=n_steps,
        ignore_eos=True,
        logprobs=True,
        return_token_ids=True,
        **engine_fields(conversation.options, tenant_salt=""),
        **fields,
    )
    values = body.get("prompt_logprobs")
    details = body["usage"].get("prompt_tokens_details") or {}
    return Answer(
        prompt_ids=body["prompt_token_ids"],
        prompt_logprobs=values and [next(iter(v.values()))["logprob"] for v in values[1:]],
        ids=body["choices"][0]["token_ids"],
        logprobs=[t["logprob"] for t in body["choices"][0]["logprobs"]["content"]],
        n_cached=details.get("cached_tokens") or 0,
    )


def compare(answer: Answer, reference: Reference, conversation: Conversation) -> Difference:
    """One forward over prompt and answer says what each token's value and the best token were."""
    prompt_ids, rows = reference.continued(conversation, answer.ids)
    n_prompt = len(prompt_ids)
    following = torch.tensor((prompt_ids + answer.ids)[1:])
    has_logit = following < rows.shape[1]
    expected = rows[:-1].gather(1, following.where(has_logit, 0)[:, None])[:, 0]
    expected = expected.where(has_logit, 0.0)
    return Difference(
        prompt_ids_equal=answer.prompt_ids == prompt_ids,
        prompt=_largest(answer.prompt_logprobs or [], expected[: n_prompt - 1]),
        answer=_largest(answer.logprobs, expected[n_prompt - 1 :]),
        greedy_equal=rows[n_prompt - 1 : -1].argmax(-1).tolist() == answer.ids,
    )


def distance(
    engine: RunningEngine, reference: Reference, conversation: Conversation, *, n_steps: int
) -> float:
    """Largest |Δ| over prompt and answer; infinite when ids differ or the engine refuses."""
    try:
        answer = ask(engine, conversation, n_steps=n_steps)
    except EngineRefusal:
        return math.inf
    difference = compare(answer, reference, conversation)
    return difference.largest if difference.prompt_ids_equal else math.inf


def _largest(found: list[float], expected: torch.Tensor) -> float:
    if not found:
        return 0.0
    if len(found) != len(expected):
        return float("inf")
    return float((torch.tensor(found) - expected).abs().max())
