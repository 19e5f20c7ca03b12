"""Requests of drawn settings beside each other, at an engine that drafts and one that does not.

Whatever a caller may ask for ends no engine; greedy and seeded answers are those without drafts.
Prints how many were compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from molmo_core.points.grammar import points_grammar, tracks_grammar
from molmo_core.prompts import Turn
from tests.bench.drafting import draw_pictures, draw_tracks
from tests.support.checkpoint import TINY
from tests.support.conversations import Conversation, draw_text
from tests.support.engine import RunningEngine, Wanted, engines_side_by_side

N_REQUESTS = 400
N_AT_ONCE = 8
MOST_OTHER_SHARE = 0.01
"""Of compared answers: two tokens that are nearly as likely may change places by rounding."""
FIELDS = {"max_model_len": 900, "max_num_seqs": 6}
"""A short context, so that prompts compete for the tokens of a step."""
GRAMMARS = (points_grammar(max_points=8), tracks_grammar([0.0, 1.0, 1.5], max_objects=2))

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def settings_of(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    max_tokens = rng.choice((1, 2, 20, 120, None))
    temperature = rng.choice((0, 0, 0.3, 0.7, 1.0, 2.0))
    wishes: tuple[tuple[float, dict[str, Any]], ...] = (
        (0.3, {"top_p": rng.choice((0.1, 0.5, 0.9, 1.0))}),
        (0.3, {"top_k": rng.choice((1, 5, 50))}),
        (0.4, {"seed": rng.randrange(5)}),
        (0.3, {"n": rng.randint(1, 4) if temperature else 1}),
        (0.2, {"stop": [rng.choice((";1.0", "the", "5"))]}),
        (0.2, {"min_tokens": rng.randint(0, max_tokens or 9)}),
        (0.2, {"presence_penalty": rng.uniform(-2, 2)}),
        (0.2, {"frequency_penalty": rng.uniform(-2, 2)}),
        (0.2, {"repetition_penalty": rng.uniform(0.5, 2)}),
        (0.4, {"logprobs": True, "top_logprobs": rng.choice((0, 1, 5, 20))}),
        (0.2, {"prompt_logprobs": rng.choice((0, 1, 5))}),
        (0.1, {"ignore_eos": True}),
        (0.3, {"structured_outputs": {"grammar": rng.choice(GRAMMARS)}}),
    )
    chosen = {"temperature": temperature, "max_tokens": max_tokens}
    for share, wish in wishes:
        if rng.random() < share:
            chosen |= wish
    return chosen


def is_settled(settings: dict[str, Any]) -> bool:
    """Whether there is one answer to it."""
    return settings["temperature"] == 0 or "seed" in settings


def test_drawn_settings_beside_each_other(tmp_path: Path, show: Callable[..., None]) -> None:
    asked = [*draw_tracks(4, tmp_path), *draw_pictures("point", 3), *draw_pictures("caption", 2)]
    for number in range(4):
        text = draw_text(number, 8 if number % 2 else 60)
        asked.append(Conversation(name="text", turns=(Turn(role="user", text=text),)))
    wanted = {
        name: Wanted(checkpoint=TINY, fields={**FIELDS, "drafts": drafts})
        for name, drafts in (("plain", "off"), ("drafting", "on"))
    }
    with engines_side_by_side(wanted, tmp_path) as engines:
        found = {name: answers(engine, asked) for name, engine in engines.items()}

    settled = [k for k in range(N_REQUESTS) if is_settled(settings_of(k))]
    other = [k for k in settled if found["plain"][k] != found["drafting"][k]]
    show(
        f"{N_REQUESTS} requests answered by each; of {len(settled)} greedy or seeded ones "
        f"{len(other)} otherwise with drafts"
    )
    assert len(other) <= MOST_OTHER_SHARE * len(settled), [settings_of(k) for k in other]


def answers(engine: RunningEngine, asked: list[Conversation]) -> list[list[list[int]]]:
    """Token ids of each choice of each request. Raises EngineRefusal."""

    def answer(number: int) -> list[list[int]]:
        messages = random.Random(f"what of {number}").choice(asked).messages()
        told = engine.chat(messages, return_token_ids=True, **settings_of(number))
        return [choice["token_ids"] for choice in told["choices"]]

    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        return list(pool.map(answer, range(N_REQUESTS)))
