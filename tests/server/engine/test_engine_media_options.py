"""The real engine with options of a request: the plain forward's values, caches that keep apart."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from fractions import Fraction

import pytest

from molmo_core.api_requests import MediaOptions
from molmo_core.prompts import Turn
from molmo_core.videos import probe_video
from molmo_server.checkpoints.folder import read_checkpoint
from molmo_server.media.gate import CheckedImage, CheckedMedia, CheckedVideo
from molmo_server.media.handing import HandedFiles, MediaFile
from molmo_server.prompt import measure
from tests.support.conversations import Conversation, draw_image, draw_video
from tests.support.engine import EngineRefusal
from tests.support.parity import TOLERANCE, ask, compare

pytestmark = pytest.mark.timeout(900)

SIZE_HW = (620, 860)
QUESTION = (Turn(role="user", text="Where?"),)
PICTURE = Conversation(
    name="picture", turns=QUESTION, images=(draw_image(SIZE_HW[1], SIZE_HW[0], 71),)
)
CLIP = Conversation(name="clip", turns=QUESTION, video=draw_video(Fraction(25), 75, 72, (96, 64)))


def with_options(conversation: Conversation, **options) -> Conversation:
    return replace(conversation, options=MediaOptions(**options))


ASKED = [
    with_options(PICTURE, max_crops=12),
    with_options(PICTURE, max_crops=2),
    with_options(CLIP, max_frames=3),
    with_options(CLIP, fps=4.0),
    with_options(CLIP, start=1.0, end=2.2),
    with_options(CLIP, max_frames=4, fps=5.0, start=0.52),
]


def counted(conversation, checkpoint) -> int:
    """As the gateway counts, without pixels."""
    file = MediaFile(data=b"", mime="")
    media = CheckedMedia(images=(CheckedImage(file=file, size_hw=SIZE_HW),))
    if conversation.video is not None:
        media = CheckedMedia(video=CheckedVideo(file=file, info=probe_video(conversation.video)))
    folder = read_checkpoint(checkpoint, max_model_len=2560)
    return asyncio.run(measure(QUESTION, media, folder, conversation.options)).n_tokens


@pytest.mark.parametrize("conversation", ASKED, ids=lambda c: c.options.model_dump_json())
def test_the_engine_computes_what_the_plain_forward_computes_with_them(
    engines, references, checkpoints, conversation
):
    answer = ask(engines["qwen3"], conversation, n_steps=8)
    difference = compare(answer, references["qwen3"], conversation)
    assert difference.prompt_ids_equal
    assert difference.largest <= TOLERANCE
    assert difference.greedy_equal
    assert len(answer.prompt_ids) == counted(conversation, checkpoints["qwen3"])


def test_no_cache_takes_one_choice_for_another(engines, references):
    """Twice each, the second time from the caches."""
    for conversation in [CLIP, *ASKED[2:], PICTURE, *ASKED[:2]] * 2:
        answer = ask(engines["qwen3"], conversation, n_steps=4, with_prompt=False)
        difference = compare(answer, references["qwen3"], conversation)
        assert difference.prompt_ids_equal
        assert difference.largest <= TOLERANCE
        assert difference.greedy_equal
    assert answer.n_cached > 0


def n_decodes(engine) -> float:
    lines = engine.client.get("/metrics").text.splitlines()
    return float(next(x for x in lines if x.startswith("molmo_video_decodes_total")).split()[1])


def test_another_question_about_a_video_decodes_and_encodes_nothing(engines):
    clip = replace(CLIP, video=draw_video(Fraction(25), 60, 73, (96, 64)))
    before = n_decodes(engines["qwen3"])
    ask(engines["qwen3"], clip, n_steps=1, with_prompt=False)
    assert n_decodes(engines["qwen3"]) == before + 1
    other = replace(clip, turns=(Turn(role="user", text="And what else is there?"),))
    answer = ask(engines["qwen3"], other, n_steps=1, with_prompt=False)
    assert n_decodes(engines["qwen3"]) == before + 1
    assert answer.n_cached >= 5 * 83 - 128, "all of the region but what its last block lacks"


def test_tenants_share_nothing(engines):
    clip = replace(CLIP, video=draw_video(Fraction(25), 60, 74, (96, 64)))
    before = n_decodes(engines["qwen3"])

    def n_cached(tenant: str) -> int:
        fields = {"cache_salt": tenant, "media_io_kwargs": {"video": {"tenant": tenant}}}
        return ask(engines["qwen3"], clip, n_steps=1, with_prompt=False, **fields).n_cached

    assert n_cached("a") == 0
    assert n_cached("b") == 0
    assert n_decodes(engines["qwen3"]) == before + 2
    assert n_cached("b") > 0


def test_a_file_that_is_named_is_the_file_that_is_sent(engines, handed):
    for conversation, mime in ((PICTURE, "image/png"), (CLIP, "video/mp4")):
        expected = ask(engines["qwen3"], conversation, n_steps=4)
        files = HandedFiles()
        data = conversation.video or conversation.images[0]
        url = asyncio.run(files.url(MediaFile(data=data, mime=mime), handed))
        assert url.startswith(f"file://{handed}/")
        messages = conversation.messages()
        part = messages[0]["content"][0]
        part[part["type"]]["url"] = url
        body = engines["qwen3"].chat(messages, max_tokens=4, ignore_eos=True, return_token_ids=True)
        assert body["prompt_token_ids"] == expected.prompt_ids
        assert body["choices"][0]["token_ids"] == expected.ids
        files.clear()
        with pytest.raises(EngineRefusal):
            engines["qwen3"].chat(messages, max_tokens=1)
    assert list(handed.iterdir()) == []
    assert engines["qwen3"].client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("conversation", "fields", "words"),
    [
        (PICTURE, {"mm_processor_kwargs": {"max_crops": 25}}, "max_crops from 1 to 24"),
        (PICTURE, {"mm_processor_kwargs": {"max_crops": 0}}, "max_crops from 1 to 24"),
        (PICTURE, {"mm_processor_kwargs": {"max_crops": True}}, "max_crops from 1 to 24"),
        (PICTURE, {"mm_processor_kwargs": {"size": {"height": 9}}}, "leave it out"),
        (CLIP, {"media_io_kwargs": {"video": {"num_frames": 385}}}, "1 to 384"),
        (CLIP, {"media_io_kwargs": {"video": {"num_frames": -1}}}, "1 to 384"),
        (CLIP, {"media_io_kwargs": {"video": {"asked_fps": 31}}}, "up to 30"),
        (CLIP, {"media_io_kwargs": {"video": {"start_s": -1}}}, "seconds from 0 on"),
        (CLIP, {"media_io_kwargs": {"video": {"start_s": 3.0}}}, "is empty"),
        (CLIP, {"media_io_kwargs": {"video": {"threads": 3}}}, "unknown video settings"),
    ],
)
def test_the_engine_refuses_what_the_gateway_did_not_check(engines, conversation, fields, words):
    with pytest.raises(EngineRefusal, match=rf"400: .*{words}"):
        engines["qwen3"].chat(conversation.messages(), max_tokens=1, **fields)
    assert engines["qwen3"].client.get("/health").status_code == 200


def test_the_engine_says_that_it_takes_options(engines):
    assert engines["qwen3"].client.get("/molmo/weights").json()["takes_media_options"] is True
