"""OpenAI's own client, unchanged: chat, models, errors, retries, timeouts, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel

from molmo_server.engine_pool.fake import DEFAULT_ANSWER, FakeEngine
from molmo_server.tenancy.store import KeyStore
from tests.server.media import image_part, picture, text_part, video, video_part
from tests.support.gateway import RunningGateway, running_gateway, until

SCENE = [image_part(picture(56, 56)), text_part("Point")]
N_VISUAL = 2 * 2 + 2 * 2
"""56 px crops of 14 px patches pooled 2x2: the whole view and one tile."""


def ask(content: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "molmo2", "messages": [{"role": "user", "content": content}], **fields}


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list()
    assert (card.id, card.object) == ("molmo2", "model")
    assert client.models.retrieve("molmo2") == card
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-4")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_a_chat_and_its_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ask(SCENE))
    answer = raw.parse()

    assert answer.choices[0].message.content == DEFAULT_ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
    assert answer.system_fingerprint == raw.headers["x-molmo-checkpoint"]
    assert int(raw.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize(
    ("content", "kind", "n_visual"),
    [
        (SCENE, "image_tokens", N_VISUAL),
        ([video_part(video()), text_part("Track")], "video_tokens", 5 * 2 * 2),
        ("text alone", None, 0),
    ],
)
def test_usage_tells_what_is_seen(
    client: openai.OpenAI, content: Any, kind: str | None, n_visual: int
) -> None:
    whole = client.chat.completions.create(**ask(content))
    *_, told, _ = client.chat.completions.create(
        **ask(content), stream=True, stream_options={"include_usage": True}
    )

    assert told.choices == []
    assert whole.usage == told.usage
    details = whole.usage and whole.usage.prompt_tokens_details
    if kind is None:
        assert details is None
    else:
        assert details is not None
        assert details.to_dict() == {kind: n_visual}


def test_only_the_event_with_usage_is_written_anew(openai_gateway: RunningGateway) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    plain = openai_gateway.stream_bytes("text alone", stream_options=usage)
    seen = openai_gateway.stream_bytes(SCENE, stream_options=usage)

    # The engine writes JSON with spaces, this service without.
    n_as_sent = [told.count(b'data: {"object": "chat') for told in (plain, seen)]
    assert n_as_sent[0] == n_as_sent[1] + 1 > 10
    assert seen.count(b'"image_tokens":8') == 1
    assert b'_tokens":' not in plain.replace(b'_tokens": ', b"")


def test_a_stream_with_the_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ask(SCENE, n=2)) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion()

    assert "".join(deltas) == DEFAULT_ANSWER * 2
    for choice in final.choices:
        assert choice.message.content == DEFAULT_ANSWER
        assert choice.message.model_extra is not None
        [point] = choice.message.model_extra["grounding"]["points"]
        assert (point["x"], point["y"]) == (0.25, 0.5)


class Scene(BaseModel):
    shape: str
    n: int


def test_an_answer_of_a_schema(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    openai_gateway.engine.script["Count"] = '{"shape": "circle", "n": 3}'

    answer = client.chat.completions.parse(**ask("Count"), response_format=Scene)

    assert answer.choices[0].message.parsed == Scene(shape="circle", n=3)
    [asked] = openai_gateway.engine.requests
    schema = asked["structured_outputs"]["json"]
    assert (schema["required"], schema["additionalProperties"]) == (["shape", "n"], False)
    assert "response_format" not in asked


def test_fields_that_say_nothing_here_are_taken(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(
        **ask("Hi", seed=3, stop=["x"], logprobs=True, top_logprobs=2, user="u", store=False),
        metadata={"run": "7"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        response_format={"type": "text"},
        modalities=["text"],
        tool_choice="none",
    )

    assert answer.choices[0].message.content == DEFAULT_ANSWER
    [asked] = openai_gateway.engine.requests
    asked.pop("messages")
    assert asked == {
        **{"model": "molmo2", "max_tokens": 1024, "seed": 3, "stop": ["x"]},
        **{"logprobs": True, "top_logprobs": 2},
    }


def test_an_answer_goes_on_and_the_prompt_has_values(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    told = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "There are "},
    ]
    wishes = {"continue_final_message": True, "prompt_logprobs": 0, "return_token_ids": True}
    client.chat.completions.create(
        model="molmo2",
        messages=told,
        max_tokens=1,
        extra_body={**wishes, "add_generation_prompt": False},
    )

    [asked] = openai_gateway.engine.requests
    assert asked["messages"][-1] == told[1]
    assert asked["add_generation_prompt"] is False
    assert (asked["prompt_logprobs"], asked["return_token_ids"]) == (0, True)


def test_log_probabilities_of_a_long_prompt_are_refused(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path, max_prompt_values=40) as gateway:
        refused = gateway.chat("x" * 40, prompt_logprobs=0)
        assert refused.status_code == 400
        assert "log-probabilities are told of at most 40" in refused.json()["error"]["message"]
        assert gateway.engine.requests == []
        assert gateway.chat("x", prompt_logprobs=0).status_code == 200


@pytest.mark.parametrize(
    ("body", "raised", "code", "param"),
    [
        (ask("Hi", temperature=3.0), openai.BadRequestError, "invalid_request", "temperature"),
        (ask("Hi", model="gpt-4"), openai.NotFoundError, "model_not_found", "model"),
        (ask("x" * 5000), openai.BadRequestError, "context_length_exceeded", "messages"),
        (ask("[400]"), openai.BadRequestError, "engine_refused", None),
        (ask("[500]"), openai.InternalServerError, "engine_failed", None),
        (ask("[503]"), openai.InternalServerError, "engine_unavailable", None),
    ],
)
def test_errors_are_the_clients_own(
    openai_gateway: RunningGateway,
    client: openai.OpenAI,
    body: dict[str, Any],
    raised: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    with pytest.raises(raised) as caught:
        client.chat.completions.create(**body)

    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type in ("invalid_request_error", "server_error")
    assert caught.value.request_id
    until(openai_gateway.is_ready)


def test_unknown_fields_and_routes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean temperature") as caught:
        client.chat.completions.create(**ask("Hi"), extra_body={"temperatur": 1})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "temperatur")
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
        client.embeddings.create(model="molmo2", input="x")


def test_a_stream_that_fails_raises(client: openai.OpenAI, openai_gateway: RunningGateway) -> None:
    with pytest.raises(openai.APIError, match="in the middle of the answer"):
        list(client.chat.completions.create(**ask("[error event]"), stream=True))
    until(openai_gateway.is_ready)


def test_keys(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    key = store.create("acme", n_concurrent=1)
    with running_gateway(folder, tmp_path, keys=tmp_path / "keys.db") as gateway:
        url = f"{gateway.url}/v1"
        stranger = openai.OpenAI(base_url=url, api_key="molmo-no")
        with stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.models.list()
        assert (caught.value.code, caught.value.type) == (
            "invalid_api_key",
            "invalid_request_error",
        )
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            stream = client.chat.completions.create(**ask("[slow]"), stream=True)
            with pytest.raises(openai.RateLimitError) as limited:
                client.chat.completions.create(**ask("Hi"))
            assert limited.value.code == "rate_limit_exceeded"
            assert limited.value.response.headers["retry-after"] == "1"
            with retrying(gateway, key, on_refusal=stream.close) as patient:
                raw = patient.chat.completions.with_raw_response.create(**ask("Hi"))
            assert raw.retries_taken == 1
    store.close()


@contextmanager
def retrying(gateway: RunningGateway, key: str, on_refusal: Any) -> Iterator[openai.OpenAI]:
    """The client as it is by default; `on_refusal` is called with the first refusal."""
    refusals: list[int] = []

    def look(response: httpx2.Response) -> None:
        if response.status_code != 200 and not refusals:
            refusals.append(response.status_code)
            on_refusal()

    http = openai.DefaultHttpxClient(event_hooks={"response": [look]})
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, http_client=http) as client:
        yield client
    assert refusals


def test_an_engine_that_is_away_is_waited_for(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_gateway(folder, tmp_path, engine) as gateway:
        engine.is_healthy = False
        until(lambda: not gateway.is_ready())

        def come_back() -> None:
            engine.is_healthy = True

        with retrying(gateway, "none", come_back) as client:
            raw = client.chat.completions.with_raw_response.create(**ask("Hi"))
    assert raw.retries_taken >= 1
    assert raw.parse().choices[0].message.content == DEFAULT_ANSWER


def test_a_timeout_reaches_the_engine(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**ask("[hang]"), timeout=0.3)
    until(lambda: openai_gateway.engine.n_dropped == 1)


def test_leaving_a_stream_reaches_the_engine(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    with client.chat.completions.create(**ask("[slow]"), stream=True) as stream:
        next(stream)
    until(lambda: openai_gateway.engine.n_dropped == 1)


async def test_the_async_client(openai_gateway: RunningGateway) -> None:
    url = f"{openai_gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer, answered = await asyncio.gather(
            client.chat.completions.create(**ask(SCENE)),
            client.responses.create(model="molmo2", input="Hi"),
        )
        assert answer.choices[0].message.content == answered.output_text == DEFAULT_ANSWER
        stream = await client.chat.completions.create(**ask(SCENE), stream=True)
        texts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(texts) == DEFAULT_ANSWER
        hanging = asyncio.ensure_future(client.chat.completions.create(**ask("[hang]")))
        await asyncio.to_thread(until, lambda: len(openai_gateway.engine.requests) == 4)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
    await asyncio.to_thread(until, lambda: openai_gateway.engine.n_dropped == 1)
