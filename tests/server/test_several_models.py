"""Several models behind one set of routes, each with engines and checkpoints of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.app import ModelParts
from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
from molmo_server.engine_pool.fake import FakeEngine
from molmo_server.settings import MolmoSettings
from tests.server.exchange import Stored
from tests.server.media import data_url, picture
from tests.server.several import ADMIN, KEY, fake_at_port
from tests.server.test_serve import address_of, serve_fake, started
from tests.support.gateway import FAST, error_of, events_of, run_fake, serve_in_thread, until

PNG = data_url(picture())


@dataclass(kw_only=True)
class Models:
    http: httpx2.Client
    fakes: dict[str, FakeEngine]
    """By model."""

    def chat(self, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def admin(self, method: str, path: str, **fields: Any) -> httpx2.Response:
        return self.http.request(method, f"/admin/{path}", headers=ADMIN, **fields)


@pytest.fixture
def models(folder: Path, stored: Stored, tmp_path: Path) -> Iterator[Models]:
    """`molmo2` serves a folder, `other` a store."""
    settings = MolmoSettings(
        checkpoint=folder,
        models={"other": str(stored.store.folder)},
        admin_key=KEY,
        follows_store=False,
        drain_s=0.5,
        health_interval_s=0.05,
    )
    fakes = {name: FakeEngine(default=name) for name in ("molmo2", "other")}

    def pool(name: str) -> EnginePool:
        address = EngineAddress(socket=tmp_path / f"{name}.sock")
        return EnginePool([RemoteEngine(name=f"{name}-engine", address=address, timing=FAST)])

    first, other = settings.of_models()
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(run_fake(fake, tmp_path / f"{name}.sock"))
        url = stack.enter_context(
            serve_in_thread(
                first,
                lambda: pool("molmo2"),
                others=lambda: [ModelParts(settings=other, engines=pool("other"))],
            )
        )
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        found = Models(http=http, fakes=fakes)
        until(lambda: found.admin("GET", "engines").json()["ready"] == 2)
        yield found


def test_requests_name_the_model_and_others_get_the_first(models: Models, stored: Stored) -> None:
    for name, expected in (("other", "other"), ("molmo2", "molmo2"), (None, "molmo2")):
        response = models.chat(model=name) if name else models.chat()
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["model"] == expected
        assert response.headers["x-molmo-checkpoint"] == answer["system_fingerprint"]
    by_checkpoint = models.chat(model=stored.first)
    assert by_checkpoint.json()["choices"][0]["message"]["content"] == "other"
    verb = {"image_url": PNG, "question": "Hi", "model": "other"}
    assert models.http.post("/v1/query", json=verb).json()["answer"] == "other"


def test_streams_name_the_model_to_the_end(models: Models, stored: Stored) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "model": "other"}
    with models.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["x-molmo-checkpoint"] == stored.first
        events = events_of(response.read())
    assert {event["model"] for event in events} == {"other"}


def test_all_are_listed_and_an_unknown_one_is_not_found(models: Models, stored: Stored) -> None:
    cards = models.http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["molmo2", "other"]
    assert cards[1]["checkpoint"] == stored.first
    assert models.http.get("/v1/models/other").json() == cards[1]
    for response in (models.http.get("/v1/models/third"), models.chat(model="third")):
        assert (response.status_code, error_of(response)["param"]) == (404, "model")
        assert f"other alias {stored.first}" in error_of(response)["message"]


def test_one_gets_other_weights_and_the_other_stays(models: Models, stored: Stored) -> None:
    second = stored.publish("second")
    first = models.admin("GET", "checkpoints").json()["current"]
    assert models.admin("POST", f"checkpoints/{second}/activate").status_code == 404
    response = models.admin("POST", f"checkpoints/{second}/activate?model=other")
    assert response.json()["outcome"] == "serving"
    assert models.fakes["other"].loaded == [second]
    assert models.fakes["molmo2"].loaded == []
    assert models.chat(model="other").json()["system_fingerprint"] == second
    assert models.chat().json()["system_fingerprint"] == first
    assert models.admin("GET", "checkpoints?model=other").json()["current"] == second
    assert models.admin("GET", "checkpoints?model=x").status_code == 404
    assert f'molmo_checkpoint{{id="{second}"}} 1.0' in models.http.get("/metrics").text


def test_one_without_engines_does_not_close_the_other(models: Models) -> None:
    models.fakes["molmo2"].is_healthy = False
    until(lambda: models.admin("GET", "engines").json()["ready"] == 1)
    assert models.http.get("/ready").status_code == 200
    assert models.chat().status_code == 503
    assert models.chat(model="other").status_code == 200


def test_an_engine_is_registered_for_one_of_them(models: Models, stored: Stored) -> None:
    new = FakeEngine(loaded=[stored.first], default="new")
    with fake_at_port(new) as url:
        report = models.admin("POST", "engines", json={"url": url, "model": "other"}).json()
        assert report["model"] == "other"
        twice = models.admin("POST", "engines", json={"url": url})
        assert "is an engine of other" in error_of(twice)["message"]
        until(lambda: models.admin("GET", "engines").json()["ready"] == 3)
        assert models.admin("DELETE", "engines/other-engine").status_code == 200
        assert models.chat(model="other").json()["choices"][0]["message"]["content"] == "new"
        assert models.chat().json()["choices"][0]["message"]["content"] == "molmo2"


@pytest.mark.parametrize("name", ["a/b", "molmo2", "", "x" * 33])
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="models has the name"):
        MolmoSettings(models={name: "/somewhere"})


def test_a_store_is_for_one_model() -> None:
    with pytest.raises(ValueError, match="models names a store twice"):
        MolmoSettings(store="s3://a", models={"other": "s3://a"})


def test_engines_on_one_machine_share_its_cores(folder: Path) -> None:
    n_cores = len(os.sched_getaffinity(0))
    alone = MolmoSettings(checkpoint=folder)
    assert alone.engine_threads is None  # vLLM takes and pins them all
    several = MolmoSettings(checkpoint=folder, n_engines=2, models={"other": str(folder)})
    assert [one.engine_threads for one in several.of_models()] == [max(n_cores // 4, 1)] * 2
    told = MolmoSettings(checkpoint=folder, n_engines=2, n_threads=7)
    assert told.engine_threads == 7


def test_molmo_serve_starts_engines_for_each(folder: Path, tmp_path: Path) -> None:
    variables = {"MOLMO_MODELS": json.dumps({"other": str(folder)}), "MOLMO_ADMIN_KEY": KEY}
    with started(serve_fake(folder, tmp_path), **variables) as server:
        address, _ = address_of(server)

        def ready() -> dict[str, str]:
            listed = httpx2.get(f"{address}/admin/engines", headers=ADMIN, timeout=60).json()
            return {e["name"]: e["model"] for e in listed["engines"] if e["state"] == "ready"}

        until(lambda: len(ready()) == 2)
        assert ready() == {"engine-0": "molmo2", "other-engine-0": "other"}
        body = {"messages": [{"role": "user", "content": "Hi"}], "model": "other"}
        answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "other"
        os.kill(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0
