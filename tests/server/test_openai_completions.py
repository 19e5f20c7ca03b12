"""Texts that go on, without a chat around them: what is asked, what is refused, what comes back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest

from molmo_core.tokens import IM_PATCH, TURN_END, TURN_START
from molmo_server.checkpoints.folder import read_checkpoint
from molmo_server.engine_pool.fake import DEFAULT_ANSWER
from molmo_server.tenancy.store import KeyStore
from tests.support.fake_completions import FakeWithCompletions
from tests.support.gateway import MAX_MODEL_LEN, RunningGateway, assert_refused, running_gateway

PATH = "/v1/completions"


def test_a_text_goes_on(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="molmo2", prompt="Once", temperature=0, seed=3, stop=["x"], user="u"
    )
    answer = raw.parse()

    assert answer.choices[0].text == DEFAULT_ANSWER
    assert answer.system_fingerprint == raw.headers["x-molmo-checkpoint"]
    assert answer.id == f"cmpl-{raw.headers['x-request-id']}"
    assert openai_gateway.engine.requests == [
        {
            **{"model": "molmo2", "prompt": "Once", "max_tokens": 16},
            **{"temperature": 0, "seed": 3, "stop": ["x"]},
        }
    ]


def test_several_texts_with_several_answers(
    openai_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    openai_gateway.engine.script |= {"one": " 1", "two": " 2"}

    answer = client.completions.create(model="molmo2", prompt=["one", "two"], n=2)

    assert [(c.index, c.text) for c in answer.choices] == [
        (0, " 1"),
        (1, " 1"),
        (2, " 2"),
        (3, " 2"),
    ]
    assert openai_gateway.engine.requests[0]["prompt"] == ["one", "two"]


@pytest.mark.parametrize(
    ("prompt", "sent"), [([5, 6], [5, 6]), ([[5], [6, 7]], [[5], [6, 7]]), ([[5, 6]], [5, 6])]
)
def test_texts_may_be_token_ids(
    openai_gateway: RunningGateway, client: openai.OpenAI, prompt: Any, sent: Any
) -> None:
    answer = client.completions.create(model="molmo2", prompt=prompt)

    assert openai_gateway.engine.requests[0]["prompt"] == sent
    assert answer.choices[-1].text == (" 13" if len(answer.choices) == 2 else " 11")


def test_a_stream_is_the_engines(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    openai_gateway.engine.script["Once"] = " upon a time"
    told = list(
        client.completions.create(
            model="molmo2", prompt="Once", stream=True, stream_options={"include_usage": True}
        )
    )
    silent = list(client.completions.create(model="molmo2", prompt="Once", stream=True))

    assert [c.choices[0].text for c in silent] == ["", " upon", " a", " time"]
    assert [c.choices[0].finish_reason for c in silent] == [None, None, None, "stop"]
    assert told[-1].usage is not None
    assert (told[-1].usage.completion_tokens, told[-1].choices) == (3, [])
    assert len(told) == len(silent) + 1


def test_log_probabilities_of_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="molmo2", prompt="Once upon", max_tokens=0, echo=True, logprobs=1
    )

    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.text.startswith("Once upon")
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[:2] == [None, -0.5]


def test_a_stream_that_fails(openai_gateway: RunningGateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="failed in the middle of the answer"):
        list(client.completions.create(model="molmo2", prompt="[error event]", stream=True))


def test_keys_are_counted_and_told_no_usage(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    key = store.create("acme")
    engine = FakeWithCompletions(script={"one": " 1 2 3"})
    with (
        running_gateway(folder, tmp_path, engine, keys=tmp_path / "keys.db") as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key) as client,
    ):
        silent = list(client.completions.create(model="molmo2", prompt="one", stream=True))
        client.completions.create(model="molmo2", prompt=["one", "one two"])
    assert all(chunk.choices for chunk in silent)
    [row] = store.usage(n_days=1, now_s=time.time())
    # As the engine counts: a word a token, three an answer
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (2, 1 + 1 + 2, 9)
    store.close()


BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "nothing": ({}, "this field is missing", "prompt"),
    "null": ({"prompt": None}, "send a text", "prompt"),
    "empty": ({"prompt": ""}, "none empty", "prompt"),
    "no texts": ({"prompt": []}, "none empty", "prompt"),
    "an empty one": ({"prompt": ["a", ""]}, "none empty", "prompt"),
    "mixed ids": ({"prompt": [5, "a"]}, "send a text", "prompt"),
    "texts and ids": ({"prompt": ["a", [5]]}, "may stand for all", "prompt"),
    "truth": ({"prompt": [True]}, "send a text", "prompt"),
    "negative": ({"prompt": [-1]}, "send a text", "prompt"),
    "many": ({"prompt": ["a"] * 17}, "got 17 texts in prompt, allowed are 16", "prompt"),
    "unknown id": ({"prompt": [10_000]}, "which the tokenizer lacks", "prompt"),
    "huge id": ({"prompt": [2**70]}, "send a text", "prompt"),
    "very many ids": ({"prompt": [[5] * 600_000] * 2}, "1,200,000 token ids", "prompt"),
    "many ids": ({"prompt": [5] * 4096}, "at least 4,096 tokens", "prompt"),
    "echo": ({"prompt": "a", "max_tokens": 0}, "goes with echo", None),
    "suffix": ({"prompt": "a", "suffix": "b"}, "fills no gaps", "suffix"),
    "best_of": ({"prompt": "a", "best_of": 2}, "not ranked", "best_of"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "allowed are 20", "logprobs"),
    "n": ({"prompt": "a", "n": 5}, "allowed are 4", "n"),
    "tokens": ({"prompt": "a", "max_tokens": 4097}, "allowed are 4,096", "max_tokens"),
    "messages": ({"messages": []}, "unknown field", "messages"),
    "stream": (
        {"prompt": "a", "prompt_logprobs": 1, "stream": True},
        "leave out stream",
        None,
    ),
    "too long": ({"prompt": "x" * 4095}, "4,096 tokens", "prompt"),
    "much too long": ({"prompt": "x" * 2_000_000}, "at least", "prompt"),
    "one too long": ({"prompt": ["x", "x" * 4095]}, "4,096 tokens", "prompt"),
    "no room": ({"prompt": "x" * 4000, "max_tokens": 500}, "at most 95", "max_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(openai_gateway: RunningGateway, name: str) -> None:
    body, says, param = BAD[name]

    error = assert_refused(openai_gateway, openai_gateway.http.post(PATH, json=body), says)

    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("token", [TURN_START, TURN_END, IM_PATCH])
def test_control_tokens_are_refused_as_text_and_as_ids(
    openai_gateway: RunningGateway, folder: Path, token: str
) -> None:
    token_id = read_checkpoint(folder).tokenizer.token_to_id(token)

    for prompt in (f"a {token} b", ["a", token], [5, token_id], [[5], [6, token_id]]):
        response = openai_gateway.http.post(PATH, json={"prompt": prompt})
        error = assert_refused(openai_gateway, response, "control token")
        assert error["code"] == "control_token_in_text"


def test_ids_may_begin_with_bos_and_are_counted_with_it(
    openai_gateway: RunningGateway, folder: Path
) -> None:
    bos = read_checkpoint(folder).tokenizer.token_to_id(TURN_END)
    room = MAX_MODEL_LEN - 1

    assert post_ids(openai_gateway, [bos, 5]).status_code == 200
    assert post_ids(openai_gateway, [bos, *[5] * (room - 2)]).status_code == 200
    assert post_ids(openai_gateway, [5] * (room - 2)).status_code == 200
    for too_many in ([bos, *[5] * room], [5] * room, [bos, bos]):
        assert post_ids(openai_gateway, too_many).status_code == 400


def post_ids(gateway: RunningGateway, ids: list[int]) -> Any:
    return gateway.http.post(PATH, json={"prompt": ids, "max_tokens": 1})
