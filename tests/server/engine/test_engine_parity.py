"""The real engine against the plain forward, and the proof that this test can fail.

Three engines are started side by side: two architectures, and vLLM's own Molmo2 as it comes. The
context is short, so that prompts compete for the tokens of a step. The full matrix (every
variant, over forty conversations) is `tests/soak/engine_parity.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import pytest

from molmo_core.prompts import Turn
from molmo_server.engine.plugin import STOCK_SWITCH
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import (
    Conversation,
    draw_image,
    draw_text,
    draw_video,
    few_conversations,
)
from tests.support.engine import engines_side_by_side
from tests.support.parity import TOLERANCE, ask, compare
from tests.support.reference import Reference

pytestmark = [pytest.mark.timeout(900), pytest.mark.engine]

N_STEPS = 64
CONVERSATIONS = {c.name: c for c in few_conversations()}
WITH_MEDIA = [c for c in CONVERSATIONS.values() if c.images or c.video]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {variant: write_checkpoint(folder / variant, variant) for variant in ("qwen3", "olmo3")}


@pytest.fixture(scope="module")
def references(checkpoints):
    return {variant: Reference(folder) for variant, folder in checkpoints.items()}


@pytest.fixture(scope="module")
def engines(checkpoints, tmp_path_factory):
    """ "qwen3", "olmo3" as trained, and "stock": the first one in vLLM's own Molmo2."""
    wanted = {
        "qwen3": (checkpoints["qwen3"], {}),
        "olmo3": (checkpoints["olmo3"], {}),
        "stock": (checkpoints["qwen3"], {STOCK_SWITCH: "1"}),
    }
    folder = tmp_path_factory.mktemp("engines")
    with engines_side_by_side(wanted, folder, max_model_len=2048) as engines:
        yield engines


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


def test_vllms_own_model_fails_the_same_comparison(engines, references):
    for conversation in WITH_MEDIA:
        answer = ask(engines["stock"], conversation, n_steps=8)
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.largest > 1e-2, conversation.name


def test_vllms_own_model_drops_bos_of_text(engines):
    text = CONVERSATIONS["text-0"]
    stock = ask(engines["stock"], text, n_steps=1).prompt_ids
    faithful = ask(engines["qwen3"], text, n_steps=1).prompt_ids
    assert faithful[1:] == stock


@pytest.mark.parametrize("with_prompt", [True, False])
def test_answers_do_not_depend_on_what_is_computed_beside(engines, references, with_prompt):
    def one(conversation):
        return ask(engines["qwen3"], conversation, n_steps=16, with_prompt=with_prompt)

    at_once = [*CONVERSATIONS.values()] * 2
    with ThreadPoolExecutor(len(at_once)) as pool:
        answers = list(pool.map(one, at_once))
    for conversation, answer in zip(at_once, answers, strict=True):
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.greedy_equal, conversation.name
        assert difference.largest <= TOLERANCE, conversation.name


def with_text(conversation: Conversation, text: str) -> Conversation:
    return replace(conversation, turns=(Turn(role="user", text=text),))


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


def images_of(*seeds: int) -> Conversation:
    files = tuple(draw_image(90 + s % 50, 140, s) for s in seeds)  # 410 tokens each
    return Conversation(name="cached", turns=(), images=files)


LONG_TEXT = draw_text(77, 60)


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


def test_visual_tokens_of_a_prompt_have_value_zero_and_rank_zero(engines):
    conversation = CONVERSATIONS["image-200x760"]
    body = engines["qwen3"].chat(
        conversation.messages(), max_tokens=1, prompt_logprobs=2, return_token_ids=True
    )
    entries = list(zip(body["prompt_token_ids"], body["prompt_logprobs"], strict=True))[1:]
    visual = [entry[str(i)] for i, entry in entries if i >= 320]
    text = [entry[str(i)] for i, entry in entries if i < 320]
    assert len(visual) > 400
    assert {(v["logprob"], v["rank"]) for v in visual} == {(0.0, 0)}
    assert all(v["logprob"] < 0 and v["rank"] >= 1 for v in text)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logprobs": True, "top_logprobs": 20},
        {"echo": True, "logprobs": True, "top_logprobs": 2},
        {"n": 2, "temperature": 1.0, "seed": 3},
    ],
)
def test_sampling_settings_leave_the_engine_alive(engines, fields):
    messages = CONVERSATIONS["images-2"].messages()
    assert engines["qwen3"].chat(messages, max_tokens=4, **fields)["choices"]
    assert engines["qwen3"].client.get("/health").status_code == 200


def test_images_and_a_video_in_one_prompt_are_refused(engines):
    mixed = Conversation(
        name="mixed",
        turns=(Turn(role="user", text="?"),),
        images=(draw_image(57, 43, 1),),
        video=draw_video(Fraction(25), 13, 1, (96, 64)),
    )
    with pytest.raises(RuntimeError, match=r"400: .*one kind at a time"):
        engines["qwen3"].chat(mixed.messages(), max_tokens=1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"image_url": {"url": "http://127.0.0.1:9/a.png"}}, "allowed domains"),
        ({"image_url": {"url": "file:///etc/hostname"}}, "Cannot load local files"),
        ({"image_url": {"url": "data:image/png;base64,AAAA"}}, "Failed to load image"),
        ({"video_url": {"url": "data:video/mp4;base64,AAAA"}}, "send a complete mp4"),
    ],
)
def test_the_engine_fetches_nothing_and_refuses_what_is_no_media(engines, part, words):
    kind = next(iter(part))
    message = {"role": "user", "content": [{"type": kind, **part}, {"type": "text", "text": "?"}]}
    with pytest.raises(RuntimeError, match=words):
        engines["qwen3"].chat([message], max_tokens=1)
