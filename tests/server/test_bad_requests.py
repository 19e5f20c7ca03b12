"""Requests that cannot be served are refused with a 4xx; the engine never sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from molmo_core.tokens import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START
from tests.server.media import data_url, image_part, picture, text_part, video_part
from tests.support.gateway import MAX_MODEL_LEN, RunningGateway, assert_refused, error_of

PNG = data_url(picture())
ASKED = {
    "messages": [{"role": "user", "content": "Hi"}],
}


BAD_CHATS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "unknown field": ({**ASKED, "temperatur": 1}, "did you mean temperature", "temperatur"),
    "engine's own field": ({**ASKED, "mm_processor_kwargs": {}}, "unknown field", None),
    "media options": ({**ASKED, "media_io_kwargs": {}}, "unknown field", None),
    "chat template": ({**ASKED, "chat_template": "{{1}}"}, "unknown field", "chat_template"),
    "salt": ({**ASKED, "cache_salt": "x"}, "unknown field", "cache_salt"),
    "tools": ({**ASKED, "tools": [{"type": "function"}]}, "calls no tools", "tools"),
    "functions": ({**ASKED, "function_call": {"name": "f"}}, "calls no tools", "function_call"),
    "store": ({**ASKED, "store": True}, "nothing is stored", "store"),
    "tier": ({**ASKED, "service_tier": "flex"}, "there is one tier", "service_tier"),
    "metadata": ({**ASKED, "metadata": {"a": 1}}, "valid string", "metadata.a"),
    "much metadata": ({**ASKED, "metadata": {str(k): "" for k in range(17)}}, "16", "metadata"),
    "audio": ({**ASKED, "modalities": ["text", "audio"]}, "answers are text", "modalities"),
    "bias": ({**ASKED, "logit_bias": {"5": 100}}, "no bias", "logit_bias"),
    "values": ({**ASKED, "prompt_logprobs": 21}, "allowed are 20", "prompt_logprobs"),
    "values of a stream": (
        {**ASKED, "prompt_logprobs": 0, "stream": True},
        "leave out stream",
        None,
    ),
    "nothing to go on from": (
        {**ASKED, "continue_final_message": True},
        "needs the assistant's message last",
        None,
    ),
    "opposite wishes": ({**ASKED, "add_generation_prompt": False}, "opposite things", None),
    "form": ({**ASKED, "response_format": {"type": "xml"}}, "type", "response_format"),
    "no messages": ({}, "messages: this field is missing", "messages"),
    "empty messages": ({"messages": []}, "messages: ", "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "role", "messages.0"),
    "type": ({**ASKED, "stream": "yes"}, "stream: ", "stream"),
    "n": ({**ASKED, "n": 5}, "got 5 in n, allowed are 4", "n"),
    "stop": ({**ASKED, "stop": ["a"] * 9}, "got 9 texts in stop, allowed are 8", "stop"),
    "logprobs": ({**ASKED, "top_logprobs": 21}, "allowed are 20", "top_logprobs"),
    "max_tokens": ({**ASKED, "max_tokens": 4097}, "4,097, allowed are 4,096", "max_tokens"),
    "no max_tokens": ({**ASKED, "max_tokens": 0}, "max_tokens: ", "max_tokens"),
    "temperature": ({**ASKED, "temperature": 2.5}, "temperature: ", "temperature"),
    "seed": ({**ASKED, "seed": 2**63}, "seed: ", "seed"),
    "top_k": ({**ASKED, "top_k": 2**31}, "top_k: ", "top_k"),
    "min_p": ({**ASKED, "min_p": 0.1}, "start the server with MOLMO_DRAFTS=off", "min_p"),
    "tool calls": (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "x", "tool_calls": [{}]},
            ]
        },
        "tool_calls",
        "messages.1.assistant.tool_calls",
    ),
    "no question": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]},
        "the last message must be the user's",
        "messages",
    ),
    "two users": ({"messages": ASKED["messages"] * 2}, "expected 'assistant'", "messages"),
    "late system": (
        {"messages": [*ASKED["messages"], {"role": "system", "content": "x"}]},
        "put it first",
        None,
    ),
    "image and video": (
        {"messages": [{"role": "user", "content": [image_part(b"x"), video_part(b"x")]}]},
        "or one video alone",
        None,
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "type",
        "messages.0.user.content.0",
    ),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(gateway: RunningGateway, name: str) -> None:
    body, says, param = BAD_CHATS[name]

    error = assert_refused(gateway, gateway.http.post("/v1/chat/completions", json=body), says)

    if param is not None:
        assert error["param"] == param


def test_unknown_field_of_a_verb(gateway: RunningGateway) -> None:
    response = gateway.http.post("/v1/point", json={"image_ur": PNG, "object": "x"})

    error = assert_refused(gateway, response, "did you mean image_url")
    assert (error["code"], error["param"]) == ("unknown_parameter", "image_ur")


@pytest.mark.parametrize("fields", [{}, {"image_url": PNG, "images": [PNG]}])
def test_not_exactly_one_kind_of_media(gateway: RunningGateway, fields: dict[str, Any]) -> None:
    response = gateway.http.post("/v1/point", json={"object": "x", **fields})

    assert_refused(gateway, response, "send exactly one of image_url, images and video_url")


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, TURN_START, TURN_END, END_OF_TEXT])
def test_control_tokens(gateway: RunningGateway, token: str) -> None:
    verb = gateway.http.post("/v1/point", json={"image_url": PNG, "object": f"a {token} b"})
    chat = gateway.chat(None, messages=[{"role": "system", "content": token}, *ASKED["messages"]])
    halves = gateway.chat([text_part(token[:3]), text_part(token[3:])])

    for response in (verb, chat, halves):
        error = assert_refused(gateway, response, f"control token {token!r}")
        assert error["code"] == "control_token_in_text"


def test_a_prompt_that_just_fits_and_one_token_more(gateway: RunningGateway) -> None:
    # BOS, <|im_start|>user\n, the text, <|im_end|>\n, <|im_start|>assistant\n; a byte is a token
    overhead = 1 + (1 + 5) + (1 + 1) + (1 + 10)
    longest = MAX_MODEL_LEN - 1 - overhead

    too_long = gateway.chat("x" * (longest + 1))
    error = assert_refused(gateway, too_long, "the prompt has 4,096 tokens with its media")
    assert error["code"] == "context_length_exceeded"

    assert gateway.chat("x" * longest).status_code == 200
    assert gateway.engine.requests[0]["max_tokens"] == 1


def test_images_count_towards_the_prompt(gateway: RunningGateway) -> None:
    # 56 px crops of 14 px patches pooled 2x2: 4 + 2*2 for the whole view + 2*(2+1) for one tile
    overhead, per_image = 1 + (1 + 5) + (1 + 1) + (1 + 10), 4 + 2 * 2 + 2 * 3
    parts = [image_part(picture(56, 56)), text_part("x" * 1000)]

    response = gateway.chat(parts, max_tokens=4000)

    n_prompt = overhead + per_image + 1000
    error = assert_refused(gateway, response, f"the prompt has {n_prompt:,} tokens")
    assert f"ask for at most {MAX_MODEL_LEN - n_prompt:,}" in error["message"]


def test_a_very_long_text_is_refused_without_counting(gateway: RunningGateway) -> None:
    response = gateway.chat("x" * 2_000_000)

    assert_refused(gateway, response, "the prompt has at least")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/point"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{not json", "the body is not JSON"),
        (b"", "the body is not JSON"),
        (b'{"a": "\xff"}', "the body is not JSON"),
        (b'{"temperature": NaN}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "valid dictionary"),
        (b"null", "valid dictionary"),
    ],
)
def test_malformed_json(gateway: RunningGateway, path: str, body: bytes, says: str) -> None:
    headers = {"content-type": "application/json"}

    assert_refused(gateway, gateway.http.post(path, content=body, headers=headers), says)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/point"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_wrong_content_type(gateway: RunningGateway, path: str, kind: str) -> None:
    body = json.dumps({"image_url": PNG, "object": "x"}).encode()

    response = gateway.http.post(path, content=body, headers={"content-type": kind})

    assert_refused(gateway, response, f"got the content-type {kind!r}; send", 415)


@pytest.mark.parametrize(
    ("data", "files", "says"),
    [
        ({"object": "x"}, {"picture": ("a.png", b"x")}, "a file in the field 'picture'"),
        ({"object": "x", "image": "text"}, {}, "the field 'image' holds text"),
        ({"object": "x", "objekt": "x"}, {"image": ("a.png", picture())}, "did you mean object"),
        ({"object": "x", "max_tokens": "many"}, {"image": ("a.png", picture())}, "max_tokens: "),
        ({"object": "x", "seed": str(10**30)}, {"image": ("a.png", picture())}, "seed: "),
        ({"object": "x"}, {"image": ("a.png", b"x")}, "image 1 is not a picture"),
        ({"object": "x" * 2_000_000}, {"image": ("a.png", b"x")}, "exceeded"),
    ],
)
def test_bad_forms(gateway: RunningGateway, data: Any, files: Any, says: str) -> None:
    # A file that is none: else the body would not be multipart.
    files = files or {"video": ("", b"")}
    response = gateway.http.post("/v1/point", data=data, files=files)

    assert_refused(gateway, response, says)


def test_a_form_without_boundaries(gateway: RunningGateway) -> None:
    for headers in ("multipart/form-data", "multipart/form-data; boundary=x"):
        response = gateway.http.post(
            "/v1/point", content=b"--y\r\n\r\n", headers={"content-type": headers}
        )
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("is_declared", [True, False])
def test_oversize_bodies(small_gateway: RunningGateway, is_declared: bool) -> None:
    """Also when the caller does not say how much is coming."""
    body = b'{"x": "' + b"y" * 3_000_000 + b'"}'
    content: Any = (
        body if is_declared else (body[k : k + 65_536] for k in range(0, len(body), 65_536))
    )

    response = small_gateway.http.post(
        "/v1/point", content=content, headers={"content-type": "application/json"}
    )

    error = assert_refused(small_gateway, response, "more than 1,000,000 bytes", 413)
    assert error["code"] == "payload_too_large"


def test_a_slow_body_is_not_waited_for(small_gateway: RunningGateway) -> None:
    headers = {"content-type": "application/json", "content-length": "100"}
    with small_gateway.connection() as caller:
        caller.putrequest("POST", "/v1/point")
        for name, value in headers.items():
            caller.putheader(name, value)
        caller.endheaders(b'{"image_url": ')
        response = caller.getresponse()

        assert response.status == 408
        assert "not complete after 0.5 s" in json.loads(response.read())["error"]["message"]


def test_unknown_paths_and_methods(gateway: RunningGateway) -> None:
    missing, method = gateway.http.get("/v1/detect"), gateway.http.get("/v1/point")
    model = gateway.chat("Hi", model="gpt-4")

    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    assert "there is no /v1/detect" in error_of(missing)["message"]
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert error_of(method)["type"] == "invalid_request_error"
    assert (model.status_code, error_of(model)["param"]) == (404, "model")
