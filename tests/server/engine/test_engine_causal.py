"""A checkpoint trained causally: steps may cut images, and a first image may be shared."""

from __future__ import annotations

import pytest

from molmo_core.prompts import Turn
from tests.support.conversations import Conversation, draw_image, draw_text, few_conversations
from tests.support.parity import TOLERANCE, ask, compare

pytestmark = pytest.mark.timeout(900)

CONVERSATIONS = {c.name: c for c in few_conversations()}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_images_cut_over_steps_are_exact(engines, references, name):
    conversation = CONVERSATIONS[name]
    answer = ask(engines["causal"], conversation, n_steps=16)
    difference = compare(answer, references["causal"], conversation)
    assert difference.prompt_ids_equal
    assert difference.largest <= TOLERANCE
    assert difference.greedy_equal


def test_a_shared_first_image_is_shared(engines, references):
    def prompt(*seeds):
        images = tuple(draw_image(100, 140, s) for s in seeds)
        return Conversation(
            name="shared", turns=(Turn(role="user", text=draw_text(5, 9)),), images=images
        )

    ask(engines["causal"], prompt(501, 502), n_steps=1, with_prompt=False)
    second = prompt(501, 503)
    answer = ask(engines["causal"], second, n_steps=8, with_prompt=False)
    assert answer.n_cached >= 384
    difference = compare(answer, references["causal"], second)
    assert difference.answer <= TOLERANCE
    assert difference.greedy_equal
