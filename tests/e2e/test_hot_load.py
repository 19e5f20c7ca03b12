"""Checkpoints under a running service with the real engine: loaded, exchanged, refused."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_core.checkpoints import FolderStore
from molmo_core.errors import CheckpointError
from molmo_core.prompts import Turn
from molmo_server.engine_pool import EnginePool, SupervisedEngine
from molmo_server.settings import MolmoSettings
from molmo_training.checkpoints.publish import publish, publish_as_it_is
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import Conversation, draw_image, draw_text
from tests.support.gateway import serve_own_engines, until

NATIVE = Path(__file__).parents[1] / "golden" / "native"
KEY = "secret"
START_LIMIT_S = 500
QUESTION = Conversation(
    name="image",
    turns=(Turn(role="user", text=draw_text(2, 5)),),
    images=(draw_image(200, 120, 2),),
)
FACTS: dict[str, Any] = {"source": "run", "code_version": "0", "created": 0.0}


@dataclass(kw_only=True)
class Service:
    http: httpx2.Client
    store: FolderStore
    pool: EnginePool
    ids: tuple[str, str]
    """Two checkpoints of one geometry; the first is served at the start."""

    @property
    def engine(self) -> SupervisedEngine:
        (engine,) = self.pool.engines
        assert isinstance(engine, SupervisedEngine)
        return engine

    def activate(self, checkpoint_id: str) -> httpx2.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return self.http.post(f"/admin/checkpoints/{checkpoint_id}/activate", headers=headers)

    def answer(self) -> tuple[str, str]:
        """Of whom, and what, to a picture and a text."""
        body = {"messages": QUESTION.messages(), "max_tokens": 8, "temperature": 0}
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        whole = response.json()
        return whole["system_fingerprint"], whole["choices"][0]["message"]["content"]

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("hot")
    store = FolderStore(folder / "store")
    ids = []
    for seed in (1, 0):
        model = write_checkpoint(folder / f"model{seed}", "qwen3", seed=seed)
        ids.append(publish(model, store, name=f"seed{seed}").id)
    settings = MolmoSettings(
        store=str(store.folder),
        cache_dir=folder / "cache",
        admin_key=KEY,
        follows_store=False,
        dtype="float32",
        n_threads=1,
        max_concurrent=4,
        start_timeout_s=START_LIMIT_S,
        first_backoff_s=0.1,
        probe_tolerance=1e-3,
    )
    with (
        serve_own_engines(settings, folder) as (url, pool),
        httpx2.Client(base_url=url, timeout=START_LIMIT_S) as http,
    ):
        yield Service(http=http, store=store, pool=pool, ids=(ids[1], ids[0]))


@pytest.fixture(autouse=True)
def _ends_as_it_began(service: Service) -> Iterator[None]:
    yield
    until(service.is_ready, START_LIMIT_S)
    assert service.activate(service.ids[0]).status_code == 200


def with_nan(service: Service, folder: Path) -> Path:
    """A copy of the second checkpoint in which one number is none."""
    shutil.copytree(service.store.folder_of(service.ids[1]), folder)
    (folder / "manifest.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.ln_f.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_with_nan_are_not_published_and_not_served(
    service: Service, tmp_path: Path
) -> None:
    before = service.answer()
    bad = with_nan(service, tmp_path / "bad")
    with pytest.raises(CheckpointError, match="they hold numbers that are none"):
        publish(bad, service.store, name="bad")
    assert len(service.store.ids()) == 2
    with service.store.staging() as staged:  # as a publisher does that computes no probes
        shutil.copytree(bad, staged / "bad")
        bad_id = service.store.publish(staged / "bad", name="bad", bidirectional="all", **FACTS).id
    response = service.activate(bad_id)
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert "was loaded and does not answer as published (probe 0" in message
    assert f"{service.ids[0]} was put back" in message
    assert service.answer() == before


def test_an_engine_that_dies_after_a_load_comes_back_with_what_it_loaded(service: Service) -> None:
    first, second = service.ids
    of_first = service.answer()
    assert of_first[0] == first
    assert service.activate(second).json()["reason"] == "activated in place"
    of_second = service.answer()
    assert of_second[0] == second
    assert of_second[1] != of_first[1]
    pid = service.engine.pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    until(lambda: service.engine.pid not in (None, pid) and service.is_ready(), START_LIMIT_S)
    assert service.answer() == of_second


def test_an_engine_that_dies_while_loading_comes_back_with_what_it_had(service: Service) -> None:
    before, engine = service.answer(), service.engine
    pid = engine.pid
    assert pid is not None
    responses: list[httpx2.Response] = []
    loading = threading.Thread(target=lambda: responses.append(service.activate(service.ids[1])))
    loading.start()
    until(lambda: engine._is_loading)
    os.killpg(pid, signal.SIGKILL)
    loading.join(timeout=START_LIMIT_S)
    message = responses[0].json()["error"]["message"]
    assert "was lost while loading" in message
    until(lambda: engine.pid not in (None, pid) and service.is_ready(), START_LIMIT_S)
    assert service.answer() == before


def test_a_native_checkpoint_of_another_geometry_takes_over_on_a_second_engine(
    service: Service,
) -> None:
    """Its probes were computed from the native files; the engine agrees with them to 1e-3."""
    of_first, old_pid = service.answer(), service.engine.pid
    manifest = publish_as_it_is(
        NATIVE / "olmo3", service.store, name="native", tokenizer=str(NATIVE / "tokenizer")
    )
    assert len(manifest.probes) == 3
    is_over, answered = threading.Event(), set[tuple[str, str]]()

    def keep_asking() -> None:
        while not is_over.is_set():
            answered.add(service.answer())

    caller = threading.Thread(target=keep_asking)
    caller.start()
    response = service.activate(manifest.id)
    until(lambda: len(answered) == 2 or not caller.is_alive())
    is_over.set()
    caller.join(timeout=60)
    assert response.status_code == 200, response.text
    event = response.json()
    assert event["reason"] == "activated on a second engine"
    assert event["seconds"]["starting a second engine"] > 1
    of_native = service.answer()
    assert of_native[0] == manifest.id
    assert answered == {of_first, of_native}  # nothing else was ever said, and nobody was refused
    assert service.engine.pid != old_pid
