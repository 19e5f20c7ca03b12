"""A checkpoint trained causally: steps may cut images, and a first image may be shared."""

from __future__ import annotations

import pytest

from molmo_core.prompts import Turn
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import Conversation, draw_image, draw_text, few_conversations
from tests.support.engine import running_engine
from tests.support.parity import TOLERANCE, ask, compare
from tests.support.reference import Reference

pytestmark = [pytest.mark.timeout(600), pytest.mark.engine]

CONVERSATIONS = {c.name: c for c in few_conversations()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "causal")


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    """Steps of 160 tokens: every image is cut into several."""
    arguments = ("--max-num-batched-tokens", "160")
    folder = tmp_path_factory.mktemp("engine")
    with running_engine(checkpoint, folder, extra_arguments=arguments) as engine:
        yield engine


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_images_cut_over_steps_are_exact(engine, reference, name):
    conversation = CONVERSATIONS[name]
    answer = ask(engine, conversation, n_steps=16)
    difference = compare(answer, reference, conversation)
    assert difference.prompt_ids_equal
    assert difference.largest <= TOLERANCE
    assert difference.greedy_equal


def test_a_shared_first_image_is_shared(engine, reference):
    def prompt(*seeds):
        images = tuple(draw_image(100, 140, s) for s in seeds)
        return Conversation(
            name="shared", turns=(Turn(role="user", text=draw_text(5, 9)),), images=images
        )

    ask(engine, prompt(501, 502), n_steps=1, with_prompt=False)
    second = prompt(501, 503)
    answer = ask(engine, second, n_steps=8, with_prompt=False)
    assert answer.n_cached >= 384
    difference = compare(answer, reference, second)
    assert difference.answer <= TOLERANCE
    assert difference.greedy_equal
