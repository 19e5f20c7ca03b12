"""The real engine against the plain forward: two architectures, some prompts of each kind.

Every variant over forty prompts is the soak, `tests/soak/test_engine_parity.py`. That this
comparison can fail is shown in `test_engine_contrasts.py`; with MOLMO_ENGINE_STOCK=1 it does here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.conversations import few_conversations
from tests.support.parity import TOLERANCE, ask, compare

pytestmark = pytest.mark.timeout(900)

N_STEPS = 64
CONVERSATIONS = {c.name: c for c in few_conversations()}


def test_there_are_enough_prompts_and_some_of_each_kind():
    kinds = {name.split("-")[0] for name in CONVERSATIONS}
    assert kinds == {"text", "image", "images", "video", "turns", "subtitles"}
    assert len(CONVERSATIONS) >= 20


@pytest.mark.parametrize("variant", ["qwen3", "olmo3"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_engine_computes_what_the_plain_forward_computes(engines, references, variant, name):
    conversation = CONVERSATIONS[name]
    answer = ask(engines[variant], conversation, n_steps=N_STEPS)
    difference = compare(answer, references[variant], conversation)
    assert difference.prompt_ids_equal
    assert difference.prompt <= TOLERANCE
    assert difference.answer <= TOLERANCE
    assert difference.greedy_equal
    assert len(answer.ids) == N_STEPS


@pytest.mark.parametrize("with_prompt", [True, False])
def test_answers_do_not_depend_on_what_is_computed_beside(engines, references, with_prompt):
    """With the prompt's values nothing is read from the cache; without, all is that can be."""

    def one(conversation):
        return ask(engines["qwen3"], conversation, n_steps=16, with_prompt=with_prompt)

    at_once = [*CONVERSATIONS.values()] * (1 if with_prompt else 2)
    with ThreadPoolExecutor(len(at_once)) as pool:
        answers = list(pool.map(one, at_once))
    assert any(answer.n_cached for answer in answers) is not with_prompt
    for conversation, answer in zip(at_once, answers, strict=True):
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.greedy_equal, conversation.name
        assert difference.largest <= TOLERANCE, conversation.name
