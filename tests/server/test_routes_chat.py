"""OpenAI's chat endpoint, over real sockets and with OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest

from molmo_core.points.grammar import points_grammar
from molmo_server.engine_pool.fake import DEFAULT_ANSWER, stream_events
from tests.server.media import image_part, picture, text_part, video, video_part
from tests.support.gateway import RunningGateway, assert_refused, events_of

TWO_IMAGES = [image_part(picture(64, 48)), image_part(picture(100, 200)), text_part("Point")]
TWO_ANSWERS = '<points coords="1 1 250 500;2 2 500 250">red circle</points>'


def test_an_answer_is_untouched_and_has_its_grounding_beside_it(gateway: RunningGateway) -> None:
    gateway.engine.script["Point"] = TWO_ANSWERS

    response = gateway.chat(TWO_IMAGES, model="molmo2", max_tokens=200)

    answer = response.json()
    message = answer["choices"][0]["message"]
    assert response.status_code == 200
    assert message["content"] == TWO_ANSWERS
    assert message["grounding"]["points"] == [
        {
            "x": 0.25,
            "y": 0.5,
            "pixel": {"x": 16.0, "y": 24.0},
            "id": 1,
            "label": "red circle",
            "media_index": 0,
            "span": [18, 27],
        },
        {
            "x": 0.5,
            "y": 0.25,
            "pixel": {"x": 50.0, "y": 50.0},
            "id": 2,
            "label": "red circle",
            "media_index": 1,
            "span": [30, 39],
        },
    ]
    assert message["grounding"]["media"] == [
        {"index": 0, "type": "image", "width": 64, "height": 48},
        {"index": 1, "type": "image", "width": 100, "height": 200},
    ]
    assert message["grounding"]["count"] == 2
    assert answer["usage"]["completion_tokens"] == -(-len(TWO_ANSWERS) // 4)


def test_every_answer_names_checkpoint_and_request(gateway: RunningGateway) -> None:
    first, second = gateway.chat("Hi"), gateway.chat("Hi")

    checkpoint = first.headers["x-molmo-checkpoint"]
    assert checkpoint.startswith("small@")
    assert first.json()["system_fingerprint"] == checkpoint
    assert first.json()["id"] == f"chatcmpl-{first.headers['x-request-id']}"
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    refused = gateway.http.post("/v1/chat/completions", json={})
    assert refused.headers["x-molmo-checkpoint"] == checkpoint
    assert len(refused.headers["x-request-id"]) == 32


def test_a_stream_is_the_engines_bytes_and_our_chunks(gateway: RunningGateway) -> None:
    streamed = gateway.stream_bytes([image_part(picture()), text_part("Where?")])

    events = events_of(streamed)
    grounding_event = events[-1]
    request_id = grounding_event["id"].removeprefix("chatcmpl-")
    identity = {
        "id": f"chatcmpl-{request_id}",
        "created": 1_700_000_000,
        "model": "molmo2",
        "system_fingerprint": "vllm-fake",
    }
    pieces = [DEFAULT_ANSWER[k : k + 4] for k in range(0, len(DEFAULT_ANSWER), 4)]
    of_the_engine = "".join(stream_events(identity, pieces, "stop", n_choices=1)).encode()
    [place] = [e for e in events if e["choices"][0]["delta"].get("grounding", {}).get("op")]
    added = [b"data: " + orjson.dumps(event) + b"\n\n" for event in (place, grounding_event)]
    before, _, after = streamed.partition(added[0])
    assert before + after == of_the_engine + added[1] + b"data: [DONE]\n\n"
    assert grounding_event["choices"][0]["finish_reason"] is None
    assert grounding_event["system_fingerprint"].startswith("small@")
    grounding = grounding_event["choices"][0]["delta"]["grounding"]
    assert [(p["x"], p["y"], p["label"]) for p in grounding["points"]] == [
        (0.25, 0.5, "red circle")
    ]
    assert grounding["declared_count"] == 1


def test_stream_and_whole_answer_give_the_same_grounding(gateway: RunningGateway) -> None:
    whole = gateway.chat(TWO_IMAGES).json()["choices"][0]["message"]
    events = events_of(gateway.stream_bytes(TWO_IMAGES))

    texts = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
    assert "".join(texts) == whole["content"]
    assert events[-1]["choices"][0]["delta"]["grounding"] == whole["grounding"]


def test_several_choices_each_have_their_grounding(gateway: RunningGateway) -> None:
    whole = gateway.chat(TWO_IMAGES, n=2).json()
    last = events_of(gateway.stream_bytes(TWO_IMAGES, n=2))[-1]

    assert [c["message"]["grounding"]["count"] for c in whole["choices"]] == [1, 1]
    assert [c["index"] for c in last["choices"]] == [0, 1]
    assert [c["delta"]["grounding"]["count"] for c in last["choices"]] == [1, 1]


def test_usage_of_a_stream_comes_when_asked_for(gateway: RunningGateway) -> None:
    events = events_of(gateway.stream_bytes("a b c", stream_options={"include_usage": True}))

    assert events[-2]["usage"]["prompt_tokens"] == 3
    assert events[-2]["choices"] == []


def test_a_video_answer_has_times_and_frames(gateway: RunningGateway) -> None:
    gateway.engine.script["Track"] = '<tracks coords="0.0 1 100 200;0.5 1 150 200">dog</tracks>'

    grounding = gateway.chat([video_part(video()), text_part("Track")]).json()
    grounding = grounding["choices"][0]["message"]["grounding"]

    assert grounding["media"] == [
        {"index": 0, "type": "video", "width": 64, "height": 32, "fps": 25.0, "duration": 2.0}
    ]
    assert grounding["frames"] == [
        {"index": 0, "time": 0.0},
        {"index": 12, "time": 0.5},
        {"index": 25, "time": 1.0},
        {"index": 37, "time": 1.5},
        {"index": 49, "time": 2.0},
    ]
    assert grounding["tracks"][0]["points"] == [
        {"t": 0.0, "frame": 0, "x": 0.1, "y": 0.2, "pixel": {"x": 6.4, "y": 6.4}},
        {"t": 0.5, "frame": 12, "x": 0.15, "y": 0.2, "pixel": {"x": 9.6, "y": 6.4}},
    ]


def test_the_engine_gets_the_layout_of_training(gateway: RunningGateway) -> None:
    image = image_part(picture())
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [text_part("One "), text_part("two")]},
        {"role": "assistant", "content": "Yes.", "grounding": {"points": []}, "refusal": None},
        {"role": "user", "content": [image, {"type": "text", "text": "What?", "style": "vqa2"}]},
    ]

    gateway.chat(None, messages=messages, temperature=0, stop=["x"], top_k=5)

    assert gateway.engine.requests == [
        {
            "model": "molmo2",
            "messages": [
                {"role": "user", "content": [image, text_part("Be short.\nOne two")]},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "vqa2: What?"},
            ],
            "max_tokens": 1024,
            "temperature": 0,
            "stop": ["x"],
            "top_k": 5,
        }
    ]


def test_the_answer_may_fill_what_the_prompt_leaves(gateway: RunningGateway) -> None:
    gateway.chat("x" * 4000)

    # BOS, <|im_start|>user\n, the text, <|im_end|>\n, <|im_start|>assistant\n; a byte is a token
    n_prompt = 1 + (1 + 5) + 4000 + (1 + 1) + (1 + 10)
    assert gateway.engine.requests[0]["max_tokens"] == 4096 - n_prompt


@pytest.mark.parametrize("is_stream", [False, True])
def test_openais_client_reads_the_answers(gateway: RunningGateway, is_stream: bool) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": TWO_IMAGES}]
        if is_stream:
            with client.chat.completions.create(
                model="molmo2", messages=messages, stream=True
            ) as chunks:
                seen = list(chunks)
            text = "".join(c.choices[0].delta.content or "" for c in seen)
            extra = seen[-1].choices[0].delta.model_extra
        else:
            message = client.chat.completions.create(model="molmo2", messages=messages)
            text = message.choices[0].message.content or ""
            extra = message.choices[0].message.model_extra
    assert text == DEFAULT_ANSWER
    assert extra is not None
    assert extra["grounding"]["points"][0]["pixel"] == {"x": 16.0, "y": 24.0}


def test_openais_client_raises_its_own_errors(gateway: RunningGateway) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
            client.chat.completions.create(
                model="gpt-4", messages=[{"role": "user", "content": "Hi"}]
            )
        assert [m.id for m in client.models.list()] == ["molmo2"]


def test_openais_client_reads_the_places_of_a_stream(gateway: RunningGateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
    content: Any = TWO_IMAGES
    gateway.engine.script["Point"] = TWO_ANSWERS

    with client.chat.completions.create(
        model="molmo2", messages=[{"role": "user", "content": content}], stream=True
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]

    groundings = [delta.model_extra["grounding"] for delta in deltas if delta.model_extra]
    assert [g["item"]["media_index"] for g in groundings[:-1]] == [0, 1]
    assert groundings[-1]["count"] == 2
    assert "".join(delta.content or "" for delta in deltas) == TWO_ANSWERS


def test_chat_is_decoded_under_a_grammar_when_that_is_asked_for(gateway: RunningGateway) -> None:
    gateway.chat(TWO_IMAGES)
    assert "structured_outputs" not in gateway.engine.requests[-1]

    asked = {"constrained": "count", "max_points": 5}
    gateway.chat(TWO_IMAGES, grounding=asked)

    expected = points_grammar(n_media=2, max_points=5, is_counted=True)
    assert gateway.engine.requests[-1]["structured_outputs"] == {"grammar": expected}
    assert "grounding" not in gateway.engine.requests[-1]


@pytest.mark.parametrize(
    ("content", "grounding", "says"),
    [
        ("Hi", {"constrained": "point"}, "send images or a video"),
        (TWO_IMAGES, {"constrained": "track"}, "send a video"),
        (TWO_IMAGES, {"constrained": "caption"}, "Input should be 'point', 'count' or 'track'"),
        (TWO_IMAGES, {}, "this field is missing"),
        (TWO_IMAGES, {"constrained": "point", "max_points": 0}, "greater than or equal to 1"),
    ],
)
def test_grounding_options_that_make_no_sense(
    gateway: RunningGateway, content: Any, grounding: dict[str, Any], says: str
) -> None:
    assert_refused(gateway, gateway.chat(content, grounding=grounding), says)
