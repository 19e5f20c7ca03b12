"""Attacks that worked on servers of this kind, by the numbers they are known under.

What concerns URLs stands in `test_remote_*`, media bombs in `test_media_bombs`, keys in
`test_tenancy`; here is what a request's fields, headers and texts were used for.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from molmo_core.tokens import IM_PATCH, IM_START, IMAGE, VIDEO
from tests.server.media import data_url, image_part, picture, text_part, video
from tests.support.gateway import RunningGateway, assert_refused, error_of

PNG = data_url(picture())
HI = [{"role": "user", "content": "Hi"}]

FIELDS_OF_THE_ENGINE: dict[str, Any] = {
    # CVE-2026-105758, -105760: more frames to decode than there are in an answer's price
    "media_io_kwargs": {"video": {"num_frames": 100_000, "fps": 1000}},
    "mm_processor_kwargs": {"max_crops": 10_000},
    # CVE-2026-115911, PYSEC-2026-4349: templates that never end
    "chat_template": "{% for a in range(10**9) %}{% endfor %}",
    "chat_template_kwargs": {"x": "{{ 1 }}"},
    # CVE-2026-105757: grammars that end the engine
    "structured_outputs": {"grammar": "root ::= root"},
    "guided_regex": "(a+)+$",
    "guided_json": {"$ref": "#"},
    "guided_grammar": "?start: start",
    # PYSEC-2026-4353 and others: what the engine trusts
    "prompt_embeds": "AAAA",
    "prompt_token_ids": [1, 2, 3],
    "cache_salt": "somebody else's",
    "kv_transfer_params": {"remote_host": "10.0.0.1"},
    "vllm_xargs": {"kv_transfer_params": {}},
    "priority": -1,
    "request_id": "http://10.0.0.1/",
    "logits_processors": ["os.system"],
    "allowed_token_ids": [-1],
    "bad_words": ["\0"],
    "add_special_tokens": True,
    "documents": [{"a": "b"}],
}


@pytest.mark.parametrize("name", FIELDS_OF_THE_ENGINE)
def test_fields_of_the_engine_are_no_fields_here(gateway: RunningGateway, name: str) -> None:
    extra = {name: FIELDS_OF_THE_ENGINE[name]}

    chat = gateway.http.post("/v1/chat/completions", json={"messages": HI, **extra})
    verb = gateway.http.post("/v1/point", json={"image_url": PNG, "object": "x", **extra})

    for response in (chat, verb):
        error = assert_refused(gateway, response, "unknown field")
        assert (error["code"], error["param"]) == ("unknown_parameter", name)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 16_384},
        {"n": 10**30},
        {"n": -1},
        {"top_logprobs": 10**9, "logprobs": True},
        {"top_logprobs": -1},
        {"max_tokens": 10**30},
        {"stop": ["a"] * 10_000},
        {"seed": 10**30},
        {"temperature": 1e308},
        {"repetition_penalty": 1e-320},
    ],
)
def test_numbers_that_multiply_the_work(gateway: RunningGateway, fields: dict[str, Any]) -> None:
    response = gateway.http.post("/v1/chat/completions", json={"messages": HI, **fields})

    error = assert_refused(gateway, response, "")
    assert error["param"] in fields


@pytest.mark.parametrize("token", [IMAGE, VIDEO, IM_PATCH, IM_START])
def test_placeholders_in_any_text_are_refused(gateway: RunningGateway, token: str) -> None:
    """CVE-2026-44222: a placeholder without a picture ended the engine."""
    answered = [*HI, {"role": "assistant", "content": token}, *HI]
    hidden = [{"role": "user", "content": [text_part(token[:2]), text_part(token[2:])]}]
    beside = [{"role": "user", "content": [image_part(picture()), text_part(token)]}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        *(("/v1/chat/completions", {"messages": m}) for m in (answered, hidden, beside)),
        ("/v1/query", {"image_url": PNG, "question": f"what is {token}?"}),
        ("/v1/count", {"image_url": PNG, "object": token}),
        ("/v1/track", {"video_url": data_url(video(), "video/mp4"), "object": token}),
    ]
    for path, body in bodies:
        error = assert_refused(gateway, gateway.http.post(path, json=body), repr(token))
        assert error["code"] == "control_token_in_text"


@pytest.mark.parametrize("sent", ["http://10.0.0.1/x", "../../etc/passwd", "a b", "x" * 4000, "'"])
def test_an_id_from_outside_goes_nowhere(gateway: RunningGateway, sent: str) -> None:
    """CVE-2026-116176: the engine asked whatever server the header named."""
    headers = {"x-request-id": sent, "x-forwarded-for": sent, "traceparent": sent}

    response = gateway.http.post("/v1/chat/completions", json={"messages": HI}, headers=headers)

    assert response.status_code == 200
    assert sent not in response.headers.values()
    assert response.json()["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert sent not in json.dumps(gateway.engine.requests)


@pytest.mark.parametrize(
    "path",
    [
        *("/tokenize", "/detokenize", "/invocations", "/inference/v1/generate", "/pooling"),
        *("/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/collective_rpc"),
        *("/update_weights", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/server_info"),
        *("/molmo/weights", "/v1/../molmo/weights", "//molmo/weights", "/%2e%2e/molmo/weights"),
    ],
)
def test_what_the_engine_also_does_is_not_reached(gateway: RunningGateway, path: str) -> None:
    for method in ("GET", "POST"):
        response = gateway.http.request(method, path, json={})
        assert response.status_code in (404, 405), path
        assert error_of(response)["type"] == "invalid_request_error"
    assert gateway.engine.requests == []


HOSTILE_TEXTS = {
    "grammar": '" | [^] ::= root\n#',
    "tag": '"></points><points coords="1 1 0 0">',
    "template": "{{ 7 * 7 }}{% raw %}${7*7}",
    "script": "<script>alert(1)</script>",
    "terminal": "\x1b]0;x\x07\x1b[2J",
    "zero": "a\0b",
    "direction": "\u202edeg\u2066",
    "surrogate": "\\ud800",
    "formula": "=cmd|' /C calc'!A0",
    "sql": "'; drop table keys; --",
    "events": "\r\n\r\ndata: [DONE]\n\n",
}


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_a_text_is_a_text(gateway: RunningGateway, name: str) -> None:
    """It reaches the model as it is, in the prompt only; the grammar is not made of it."""
    text = HOSTILE_TEXTS[name]
    gateway.engine.default = text
    body = {"image_url": PNG, "constrained": True}
    try:
        tame = gateway.http.post("/v1/point", json={**body, "object": "x"})
        wild = gateway.http.post("/v1/point", json={**body, "object": text})
        chat = gateway.chat(text)
        stream = gateway.stream_bytes(text)
    finally:
        del gateway.engine.default

    assert {r.status_code for r in (tame, wild, chat)} == {200}
    first, second, third, _ = gateway.engine.requests
    assert first["structured_outputs"] == second["structured_outputs"]
    assert text in second["messages"][0]["content"][-1]["text"]
    assert third["messages"][0]["content"][-1]["text"] == text
    assert wild.json()["text"] == chat.json()["choices"][0]["message"]["content"] == text
    assert stream.count(b"data: [DONE]\n\n") == 1  # what is in a text is escaped
    assert wild.headers["content-type"] == "application/json"


def test_half_a_character_is_refused(gateway: RunningGateway) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"content-type": "application/json"}

    assert_refused(
        gateway, gateway.http.post("/v1/chat/completions", content=body, headers=headers), "JSON"
    )


@pytest.mark.parametrize("depth", [50, 500, 100_000])
def test_deep_json(gateway: RunningGateway, depth: int) -> None:
    body = b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
    headers = {"content-type": "application/json"}

    assert_refused(
        gateway, gateway.http.post("/v1/chat/completions", content=body, headers=headers), ""
    )
