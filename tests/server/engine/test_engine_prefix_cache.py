"""What the real engine takes from its prefix cache, and that answers stay exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import pytest

from molmo_core.prompts import Turn
from tests.support.conversations import Conversation, draw_image, draw_text, draw_video
from tests.support.parity import TOLERANCE, ask, compare

pytestmark = pytest.mark.timeout(900)

LONG_TEXT = draw_text(77, 60)


def with_text(conversation: Conversation, text: str) -> Conversation:
    return replace(conversation, turns=(Turn(role="user", text=text),))


def images_of(*seeds: int) -> Conversation:
    files = tuple(draw_image(90 + s % 50, 140, s) for s in seeds)  # 410 tokens each
    return Conversation(name="cached", turns=(), images=files)


@pytest.fixture
def check(engines, references):
    """Ask for the answer only, so that the cache is read; return how much of it was."""

    def asked(conversation):
        answer = ask(engines["qwen3"], conversation, n_steps=8, with_prompt=False)
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.largest <= TOLERANCE
        assert difference.greedy_equal
        return answer.n_cached

    return asked


def test_a_cached_prompt_gives_the_same_answer(check):
    conversation = with_text(images_of(401, 402), LONG_TEXT)
    assert check(conversation) == 0
    region_end = 2 * 410 + len("Image 1") * 2 + 1
    assert check(conversation) >= region_end


def test_another_question_about_an_image_uses_the_hit_that_ends_inside_it(check):
    assert check(with_text(images_of(421), "One?")) == 0
    assert check(with_text(images_of(421), "Two, and more?")) == 384


def test_another_question_about_several_images_uses_the_hit(check):
    assert check(with_text(images_of(425, 426, 427), "One?")) == 0
    assert check(with_text(images_of(425, 426, 427), "And now?")) == 1152


@pytest.mark.parametrize("n_frames", [40, 61, 77, 90])
def test_another_question_about_a_video_uses_the_hit_between_its_frames(check, n_frames):
    video = draw_video(Fraction(25), n_frames, 1000 + n_frames, (96, 64))
    conversation = Conversation(name="cached", turns=(), video=video)
    assert check(with_text(conversation, "One?")) == 0
    n_region = (n_frames * 2 // 25 + 2) * 83  # and the timestamps
    assert check(with_text(conversation, "And now?")) >= n_region - 128


def test_the_same_question_at_once_shares_within_a_step(engines, references):
    conversation = with_text(images_of(461, 462), "Both?")
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda c: ask(engines["qwen3"], c, n_steps=8, with_prompt=False), [conversation] * 4
            )
        )
    for answer in answers:
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.largest <= TOLERANCE
        assert difference.greedy_equal


def test_another_image_behind_changes_the_keys_of_the_first(check):
    check(with_text(images_of(431, 432), LONG_TEXT))
    assert check(with_text(images_of(431, 433), LONG_TEXT)) == 0
    assert check(with_text(images_of(431), LONG_TEXT)) == 0


def test_the_order_of_images_matters(check):
    check(with_text(images_of(441, 442), LONG_TEXT))
    assert check(with_text(images_of(442, 441), LONG_TEXT)) == 0
