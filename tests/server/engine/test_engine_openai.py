"""OpenAI's surface over the real engine: log-probabilities of prompts, JSON, responses."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
import torch

from molmo_core.prompts import Turn
from molmo_server.engine_pool import EngineAddress, EnginePool, EngineTiming, RemoteEngine
from molmo_server.settings import MolmoSettings
from tests.server.engine.conftest import SHORT
from tests.support.conversations import Conversation, few_conversations
from tests.support.gateway import serve_in_thread, until
from tests.support.parity import TOLERANCE
from tests.support.reference import BOS

pytestmark = pytest.mark.timeout(900)

CONVERSATIONS = {c.name: c for c in few_conversations()}
TEXT = "Where is the red circle? It is to the left of the blue square."
WISHES = {"prompt_logprobs": 0, "return_token_ids": True}
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "star"]}, "big": {"type": "boolean"}},
    "required": ["shape", "big"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(engines, checkpoints):
    """Of a gateway in front of the shared engine."""
    settings = MolmoSettings(checkpoint=checkpoints["qwen3"], **SHORT)

    def pool():
        address = EngineAddress(socket=engines["qwen3"].socket)
        return EnginePool([RemoteEngine(name="engine-0", address=address, timing=EngineTiming())])

    with (
        serve_in_thread(settings, pool) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        until(lambda: engines["qwen3"].client.get("/health").status_code == 200)
        until(lambda: is_ready(url))
        yield client


def is_ready(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        try:
            return client.get("/ready", cast_to=dict[str, str])["status"] == "ready"
        except openai.InternalServerError:
            return False


def expected_values(reference, ids):
    rows = torch.log_softmax(reference.model(torch.tensor([ids])).logits[0].float(), dim=-1)
    return rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def test_log_probabilities_of_a_text(client, references):
    asked = {"model": "molmo2", "prompt": TEXT, "temperature": 0}
    told = client.completions.create(**asked, max_tokens=1, extra_body=WISHES).choices[0]
    echoed = client.completions.create(**asked, max_tokens=0, echo=True, logprobs=0).choices[0]
    streamed = client.completions.create(**asked, max_tokens=0, echo=True, logprobs=0, stream=True)

    reference = references["qwen3"]
    ids = reference.tokenizer.encode(BOS + TEXT, add_special_tokens=False).ids
    assert told.model_extra["prompt_token_ids"] == ids
    expected = expected_values(reference, ids)
    values = [next(iter(v.values()))["logprob"] for v in told.model_extra["prompt_logprobs"][1:]]
    assert (torch.tensor(values) - expected).abs().max() <= TOLERANCE
    assert echoed.text == TEXT
    assert echoed.logprobs.token_logprobs[0] is None
    assert (torch.tensor(echoed.logprobs.token_logprobs[1:]) - expected).abs().max() <= TOLERANCE
    [first, *_] = streamed
    assert first.choices[0].logprobs.token_logprobs == echoed.logprobs.token_logprobs


@torch.no_grad()
def test_ids_and_their_text_are_the_same(client, references):
    bos, *ids = references["qwen3"].tokenizer.encode(BOS + TEXT, add_special_tokens=False).ids
    asked = {"model": "molmo2", "max_tokens": 8, "temperature": 0}
    texts = [
        client.completions.create(**asked, prompt=prompt).choices[0].text
        for prompt in (TEXT, ids, [bos, *ids])
    ]
    several = client.completions.create(**asked, prompt=[TEXT, TEXT]).choices
    assert {*texts} == {choice.text for choice in several} == {texts[0]}


def test_the_loss_of_an_answer_to_a_picture(client, references):
    """The assistant's last message is the prompt's end, just as the trainer sees it."""
    gold = Turn(role="assistant", text='<points coords="1 1 250 500">red circle</points> ')
    asked = CONVERSATIONS["image-200x760"]
    conversation: Conversation = replace(asked, turns=(*asked.turns, gold))

    answer = client.chat.completions.create(
        model="molmo2",
        messages=conversation.messages(),
        max_tokens=1,
        temperature=0,
        extra_body={**WISHES, "continue_final_message": True, "add_generation_prompt": False},
    )

    ids, rows = references["qwen3"].continued(conversation, [])
    assert answer.model_extra["prompt_token_ids"] == ids
    n_gold = len(references["qwen3"].tokenizer.encode(gold.text, add_special_tokens=False).ids)
    values = [
        next(iter(v.values()))["logprob"] for v in answer.model_extra["prompt_logprobs"][-n_gold:]
    ]
    expected = rows[-n_gold - 1 : -1].gather(1, torch.tensor(ids[-n_gold:])[:, None])[:, 0]
    assert (torch.tensor(values) - expected).abs().max() <= TOLERANCE
    assert answer.usage.prompt_tokens_details.image_tokens > 400


def test_json_of_a_schema_and_schemas_that_nothing_fits(client, engines):
    """Random weights: only the grammar makes them write JSON."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    asked = {"model": "molmo2", "messages": CONVERSATIONS["image-200x760"].messages()}
    answer = client.chat.completions.create(**asked, max_tokens=100, response_format=form)
    found = json.loads(answer.choices[0].message.content)
    assert sorted(found) == ["big", "shape"]
    for broken in (
        {"type": "integer", "minimum": 5, "maximum": 2},
        {"items": False, "minItems": 1},
    ):
        form["json_schema"]["schema"] = {"type": "array", **broken}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, max_tokens=100, response_format=form)
    answered = client.responses.create(
        model="molmo2",
        input="Which?",
        max_output_tokens=100,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    )
    assert sorted(json.loads(answered.output_text)) == ["big", "shape"]
    assert engines["qwen3"].client.get("/health").status_code == 200
