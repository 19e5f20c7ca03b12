"""OpenAI's responses, asked with its own client: one answer, nothing kept, grounding beside it."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from pydantic import BaseModel

from molmo_server.engine_pool.fake import DEFAULT_ANSWER
from tests.server.media import data_url, picture, video
from tests.support.gateway import RunningGateway, assert_refused, until

PICTURE = {"type": "input_image", "image_url": data_url(picture(64, 48)), "detail": "auto"}
QUESTION = [
    {"role": "user", "content": [PICTURE, {"type": "input_text", "text": "Point"}]},
]
POINT = {
    "type": "point",
    **{"id": 1, "label": "red circle", "media_index": 0, "x": 0.25, "y": 0.5, "span": [31, 40]},
    "pixel": {"x": 16.0, "y": 24.0},
}


def text_of(response: Any) -> ResponseOutputText:
    """The only part of the only item."""
    [item] = response.output
    assert isinstance(item, ResponseOutputMessage)
    [part] = item.content
    assert isinstance(part, ResponseOutputText)
    return part


def test_a_question_about_a_picture(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="molmo2",
        instructions="Be short.",
        input=QUESTION,
        max_output_tokens=200,
        temperature=0,
        metadata={"run": "7"},
        store=False,
    )
    answer = raw.parse()

    assert answer.output_text == DEFAULT_ANSWER
    assert (answer.id, answer.status) == (f"resp_{raw.headers['x-request-id']}", "completed")
    assert (answer.error, answer.incomplete_details) == (None, None)
    assert (answer.instructions, answer.metadata) == ("Be short.", {"run": "7"})
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0, 1, 200)
    assert (answer.tools, answer.tool_choice, answer.background) == ([], "none", False)
    assert answer.model_extra is not None
    assert answer.model_extra["store"] is False
    assert answer.model_extra["system_fingerprint"] == raw.headers["x-molmo-checkpoint"]
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 0
    assert answer.usage.input_tokens_details.to_dict()["image_tokens"] > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    [asked] = openai_gateway.engine.requests
    assert asked["messages"][0]["content"][1]["text"] == "Be short.\nPoint"
    assert (asked["max_tokens"], asked["temperature"]) == (200, 0)


def test_grounding_stands_beside_the_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="molmo2", input=QUESTION)

    part = text_of(answer)
    assert part.annotations == []
    assert part.model_extra is not None
    assert answer.model_extra is not None
    grounding = part.model_extra["grounding"]
    assert grounding == answer.model_extra["grounding"]
    assert grounding["count"] == 1
    assert grounding["points"] == [{k: v for k, v in POINT.items() if k != "type"}]


def test_a_video_and_its_tracks(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    openai_gateway.engine.script["Track"] = '<tracks coords="0.0 1 100 200">dog</tracks>'
    content = [
        {"type": "input_video", "video_url": data_url(video(), "video/mp4")},
        {"type": "input_text", "text": "Track"},
    ]
    answer = client.responses.create(
        model="molmo2",
        input=[{"role": "user", "content": content}],
    )

    assert answer.model_extra is not None
    [track] = answer.model_extra["grounding"]["tracks"]
    assert (track["label"], track["points"][0]["t"]) == ("dog", 0.0)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.to_dict()["video_tokens"] == 5 * 2 * 2


def test_a_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="molmo2", input=QUESTION, stream=True))

    every_kind = [event.type for event in events]
    at = every_kind.index("response.output_text.annotation.added")
    kinds = every_kind[:at] + every_kind[at + 1 :]
    assert every_kind[at - 1] == every_kind[at + 1] == "response.output_text.delta"
    n_deltas = kinds.count("response.output_text.delta")
    assert n_deltas > 5
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * n_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == DEFAULT_ANSWER
    [added] = [e for e in events if e.type == "response.output_text.annotation.added"]
    place = {k: v for k, v in POINT.items() if k != "label"}  # which comes with the whole answer
    assert added.annotation.to_dict(warnings=False) == place  # of a type that the client lacks
    whole = client.responses.create(model="molmo2", input=QUESTION)
    assert without_identity(events[-1].response) == without_identity(whole)


def without_identity(response: Any) -> dict[str, Any]:
    told: dict[str, Any] = response.to_dict()
    told["output"] = [{**item, "id": ""} for item in told["output"]]
    return {k: v for k, v in told.items() if k not in ("id", "created_at", "completed_at")}


class Scene(BaseModel):
    shape: str


def test_the_clients_helpers(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    openai_gateway.engine.script["Which"] = '{"shape": "star"}'

    parsed = client.responses.parse(model="molmo2", input="Which?", text_format=Scene)
    with client.responses.stream(model="molmo2", input="Which?", text_format=Scene) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()

    assert parsed.output_parsed == final.output_parsed == Scene(shape="star")
    assert "".join(deltas) == '{"shape": "star"}'
    for asked in openai_gateway.engine.requests:
        assert asked["structured_outputs"]["json"]["required"] == ["shape"]
    assert parsed.text is not None
    assert parsed.text.to_dict()["format"]["name"] == "Scene"


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="molmo2", input="Hi", max_output_tokens=2)
    *_, last = client.responses.create(model="molmo2", input="Hi", max_output_tokens=2, stream=True)

    assert last.type == "response.incomplete"
    for cut in (answer, last.response):
        assert cut.status == cut.output[0].to_dict()["status"] == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"


def test_a_conversation_is_sent_whole(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="molmo2", input=QUESTION)
    openai_gateway.engine.requests.clear()

    turns: list[Any] = [
        {"role": "developer", "content": "Be exact."},
        *QUESTION,
        *(item.to_dict() for item in first.output),
        {"type": "message", "role": "user", "content": "And now?"},
    ]
    client.responses.create(model="molmo2", input=turns)

    [asked] = openai_gateway.engine.requests
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant", "user"]
    assert asked["messages"][0]["content"][1]["text"] == "Be exact.\nPoint"
    assert asked["messages"][1]["content"] == DEFAULT_ANSWER


def test_a_stream_that_fails_says_so(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    *_, last = client.responses.create(model="molmo2", input="[error event]", stream=True)

    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "in the middle of the answer" in last.response.error.message
    assert last.response.status == "failed"
    until(openai_gateway.is_ready)


ASKED = {"input": "Hi"}
BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "nothing": ({}, "this field is missing", "input"),
    "no items": ({"input": []}, "input: ", "input"),
    "tools": ({**ASKED, "tools": [{"type": "web_search"}]}, "calls no tools", "tools"),
    "before": ({**ASKED, "previous_response_id": "resp_1"}, "whole conversation", None),
    "conversation": ({**ASKED, "conversation": "conv_1"}, "whole conversation", "conversation"),
    "background": ({**ASKED, "background": True}, "waited for", "background"),
    "store": ({**ASKED, "store": True}, "nothing is stored", "store"),
    "prompt": ({**ASKED, "prompt": {"id": "p"}}, "no prompts are kept", "prompt"),
    "reasoning": ({**ASKED, "reasoning": {"effort": "high"}}, "does not reason", "reasoning"),
    "truncation": ({**ASKED, "truncation": "auto"}, "no prompt is cut", "truncation"),
    "include": ({**ASKED, "include": ["file_search_call.results"]}, "include", "include.0"),
    "logprobs": ({**ASKED, "top_logprobs": 21}, "allowed are 20", "top_logprobs"),
    "unknown": ({**ASKED, "max_tokens": 5}, "unknown field", "max_tokens"),
    "file": (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
        "input_file",
        "input.0.content.0",
    ),
    "file id": (
        {"input": [{"role": "user", "content": [{**PICTURE, "file_id": "f"}]}]},
        "in image_url",
        None,
    ),
    "picture of the system": (
        {"input": [{"role": "system", "content": [PICTURE]}, {"role": "user", "content": "x"}]},
        "more than text",
        None,
    ),
    "tool's output": (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
        "unknown field",
        "input.0.call_id",
    ),
    "late system": (
        {"input": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "put it first",
        None,
    ),
    "no question": ({"input": [{"role": "assistant", "content": "x"}]}, "must be the user's", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(openai_gateway: RunningGateway, name: str) -> None:
    body, says, param = BAD[name]

    response = openai_gateway.http.post("/v1/responses", json=body)

    error = assert_refused(openai_gateway, response, says)
    if param is not None:
        assert error["param"] == param


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="molmo2", input="Hi")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_log_probabilities_are_passed_on(openai_gateway: RunningGateway) -> None:
    asked = {**ASKED, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    openai_gateway.http.post("/v1/responses", json=asked)

    [sent] = openai_gateway.engine.requests
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)
