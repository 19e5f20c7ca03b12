"""What the real engine answers to settings that kill stock vLLM, and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest

from molmo_core.prompts import Turn
from tests.support.checkpoint import BASE_VOCAB
from tests.support.conversations import Conversation, draw_image, draw_video, few_conversations
from tests.support.engine import EngineRefusal

pytestmark = pytest.mark.timeout(900)

CONVERSATIONS = {c.name: c for c in few_conversations()}


def test_visual_tokens_of_a_prompt_have_value_zero_and_rank_zero(engines):
    """Stock vLLM dies of this request: visual tokens have no row of logits."""
    conversation = CONVERSATIONS["image-200x760"]
    body = engines["qwen3"].chat(
        conversation.messages(), max_tokens=1, prompt_logprobs=2, return_token_ids=True
    )
    entries = list(zip(body["prompt_token_ids"], body["prompt_logprobs"], strict=True))[1:]
    visual = [entry[str(i)] for i, entry in entries if i >= BASE_VOCAB]
    text = [entry[str(i)] for i, entry in entries if i < BASE_VOCAB]
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


def test_a_prompt_longer_than_the_context_is_refused_with_the_allowed_length(engines):
    """So no visual region is larger than a step, which holds a whole context."""
    images = tuple(draw_image(720, 405, seed) for seed in range(4))  # 4 x 1000 tokens
    long = Conversation(name="long", turns=(Turn(role="user", text="?"),), images=images)
    with pytest.raises(EngineRefusal, match=r"^400: .*2560"):
        engines["qwen3"].chat(long.messages(), max_tokens=1)
    assert engines["qwen3"].client.get("/health").status_code == 200


def test_images_and_a_video_in_one_prompt_are_refused(engines):
    mixed = Conversation(
        name="mixed",
        turns=(Turn(role="user", text="?"),),
        images=(draw_image(57, 43, 1),),
        video=draw_video(Fraction(25), 13, 1, (96, 64)),
    )
    with pytest.raises(EngineRefusal, match=r"400: .*one kind at a time"):
        engines["qwen3"].chat(mixed.messages(), max_tokens=1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"image_url": {"url": "http://127.0.0.1:9/a.png"}}, "allowed domains"),
        ({"image_url": {"url": "file:///etc/hostname"}}, "must be a subpath"),
        ({"image_url": {"url": "data:image/png;base64,AAAA"}}, "Failed to load image"),
        ({"video_url": {"url": "data:video/mp4;base64,AAAA"}}, "send a complete mp4"),
    ],
)
def test_the_engine_fetches_nothing_and_refuses_what_is_no_media(engines, part, words):
    kind = next(iter(part))
    message = {"role": "user", "content": [{"type": kind, **part}, {"type": "text", "text": "?"}]}
    with pytest.raises(EngineRefusal, match=words):
        engines["qwen3"].chat([message], max_tokens=1)
