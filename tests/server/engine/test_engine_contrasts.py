"""Two engines unlike the faithful one: vLLM's own Molmo2, and a checkpoint trained causally.

The first proves that the comparison can fail. For the second, steps may cut images and a first
image may be shared.
"""

from __future__ import annotations

import pytest

from molmo_core.prompts import Turn
from tests.support.conversations import Conversation, draw_image, draw_text, few_conversations
from tests.support.parity import TOLERANCE, ask, compare, distance

pytestmark = pytest.mark.timeout(900)

CONVERSATIONS = {c.name: c for c in few_conversations()}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_vllms_own_model_fails_the_comparison(contrasts, references, name):
    found = distance(contrasts["stock"], references["qwen3"], CONVERSATIONS[name], n_steps=4)
    assert found > 100 * TOLERANCE


def test_vllms_own_model_drops_bos_of_text(contrasts, references):
    text = CONVERSATIONS["text-0"]
    stock = ask(contrasts["stock"], text, n_steps=1).prompt_ids
    assert stock == references["qwen3"].inputs(text).ids[1:]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_images_cut_over_steps_are_exact_when_trained_causally(contrasts, references, name):
    conversation = CONVERSATIONS[name]
    answer = ask(contrasts["causal"], conversation, n_steps=16)
    difference = compare(answer, references["causal"], conversation)
    assert difference.prompt_ids_equal
    assert difference.largest <= TOLERANCE
    assert difference.greedy_equal


def test_a_first_image_is_shared_when_trained_causally(contrasts, references):
    def prompt(*seeds):
        images = tuple(draw_image(100, 140, s) for s in seeds)
        return Conversation(
            name="shared", turns=(Turn(role="user", text=draw_text(5, 9)),), images=images
        )

    ask(contrasts["causal"], prompt(501, 502), n_steps=1, with_prompt=False)
    second = prompt(501, 503)
    answer = ask(contrasts["causal"], second, n_steps=8, with_prompt=False)
    assert answer.n_cached >= 384
    difference = compare(answer, references["causal"], second)
    assert difference.answer <= TOLERANCE
    assert difference.greedy_equal
