"""Other weights in a real engine: answers are those of the loaded ones, to the digit."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_core.prompts import Turn
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import Conversation, draw_image, draw_text, draw_video
from tests.support.parity import TOLERANCE, ask, compare
from tests.support.reference import Reference

pytestmark = pytest.mark.timeout(900)

PROMPTS = (
    Conversation(name="text", turns=(Turn(role="user", text=draw_text(5, 12)),)),
    Conversation(
        name="image",
        turns=(Turn(role="user", text=draw_text(6, 6)),),
        images=(draw_image(200, 120, 7),),
    ),
    Conversation(
        name="images",
        turns=(Turn(role="user", text=draw_text(8, 6)),),
        images=(draw_image(90, 140, 8), draw_image(120, 90, 9)),
    ),
    Conversation(
        name="video",
        turns=(Turn(role="user", text=draw_text(10, 6)),),
        video=draw_video(Fraction(25), 40, 11, (160, 120)),
    ),
)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("other") / "qwen3-b", "qwen3", seed=1)


@pytest.fixture(scope="module")
def other_reference(other):
    return Reference(other)


@pytest.fixture
def engine(engines, checkpoints):
    """The shared engine; whatever a test does, it ends with its own weights."""
    yield engines["qwen3"]
    response = load(engines["qwen3"], checkpoints["qwen3"], "a")
    assert response.status_code == 200


def load(engine, folder, version):
    body = {"folder": str(folder), "version": version}
    return engine.client.post("/molmo/weights", json=body)


def check(engine, reference):
    """Every prompt twice: the second time from the caches."""
    for prompt in PROMPTS * 2:
        answer = ask(engine, prompt, n_steps=12, with_prompt=False)
        difference = compare(answer, reference, prompt)
        assert difference.largest <= TOLERANCE, prompt.name
        assert difference.greedy_equal, prompt.name


def test_there_and_back_with_warm_caches(engine, checkpoints, references, other, other_reference):
    check(engine, references["qwen3"])
    for _ in range(2):
        response = load(engine, other, "b")
        assert response.status_code == 200
        assert sorted(response.json()["seconds"]) == ["load", "pause", "resume"]
        check(engine, other_reference)
        assert load(engine, checkpoints["qwen3"], "a").status_code == 200
        check(engine, references["qwen3"])
    loaded = engine.client.get("/molmo/weights").json()
    assert loaded == {
        "folder": str(checkpoints["qwen3"]),
        "version": "a",
        "takes_media_options": True,
    }


def test_the_version_stands_in_the_answers(engine, other):
    load(engine, other, "version-b")
    answer = engine.chat([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert answer["system_fingerprint"] == "version-b"


def test_answers_under_way_end_on_the_weights_they_began_with(
    engine, references, other, other_reference
):
    """Four are being computed when the load is asked for; four more come while it waits."""
    prompts = [replace(p, turns=(Turn(role="user", text=draw_text(30 + k, 20)),))
               for k, p in enumerate(PROMPTS)]  # fmt: skip
    with ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(ask, engine, p, n_steps=60, with_prompt=False) for p in prompts]
        loading = pool.submit(load, engine, other, "b")
        later = [pool.submit(ask, engine, p, n_steps=8, with_prompt=False) for p in prompts]
        assert loading.result().status_code == 200
        for answers in (asked, later):
            for prompt, future in zip(prompts, answers, strict=True):
                answer = future.result()
                fits = [
                    compare(answer, reference, prompt).largest <= TOLERANCE
                    for reference in (references["qwen3"], other_reference)
                ]
                assert fits.count(True) == 1, prompt.name  # of one checkpoint, never a mixture


def spoil(folder, kind):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.transformer.blocks.0.self_attn.att_proj.weight"
    if kind == "missing":
        del weights[name]
    elif kind == "shape":
        weights[name] = torch.zeros(7, 5)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-50_000])
    else:
        save_file(weights, path, metadata={"format": "pt"})


SAYS = {
    "gone": "nothing was loaded: 114 tensors are missing",
    "cut": "loading failed",
    "missing": "nothing was loaded: 1 tensors are missing",
    "shape": "is ('F32', (7, 5)), running is",
}


@pytest.mark.parametrize("kind", SAYS)
def test_what_cannot_be_loaded_leaves_the_old_weights(
    engine, references, checkpoints, other, tmp_path, kind
):
    folder = tmp_path / "bad"
    if kind != "gone":
        shutil.copytree(other, folder)
        spoil(folder, kind)
    response = load(engine, folder, "bad")
    content = json.loads(response.text)
    assert response.status_code == 409, content
    assert SAYS[kind] in content["error"]["message"]
    check(engine, references["qwen3"])
    assert engine.client.get("/molmo/weights").json()["version"] != "bad"
