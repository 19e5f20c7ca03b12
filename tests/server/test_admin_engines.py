"""`/admin/engines`: what operators and autoscalers see and change while the service runs."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.engine_pool import EngineState, SupervisedEngine
from molmo_server.engine_pool.fake import FakeEngine
from molmo_server.settings import MolmoSettings
from tests.server.exchange import FakeEngines, Stored, serving
from tests.server.processes import is_alive
from tests.server.several import ADMIN, Several, fake_at_port, several
from tests.support.gateway import error_of, until


@pytest.fixture
def two(stored: Stored, tmp_path: Path) -> Any:
    fields = {"store": str(stored.store.folder), "follows_store": False}
    with several(tmp_path, health_interval_s=0.05, **fields) as running:
        yield running


def test_it_lists_the_engines_and_what_an_autoscaler_goes_by(two: Several, stored: Stored) -> None:
    listed = two.admin("GET").json()
    assert {k: listed[k] for k in ("queued", "running", "ready")} == {
        "queued": 0,
        "running": 0,
        "ready": 2,
    }
    assert listed["engines"][0] == {
        "name": "engine-0",
        "model": "molmo2",
        "url": "",
        "checkpoint": stored.first,
        "state": "ready",
        "reason": "answers",
        "breaker": "closed",
        "in_flight": 0,
        "restarts": 0,
    }
    metrics = two.http.get("/metrics").text
    assert 'molmo_engine_in_flight{engine="engine-1"} 0.0' in metrics
    assert 'molmo_engine_ready{engine="engine-1"} 1.0' in metrics


def test_an_engine_is_registered_asked_and_removed(two: Several, stored: Stored) -> None:
    new = FakeEngine(loaded=[stored.first])
    with fake_at_port(new) as url:
        name = url.partition("://")[2]
        for _ in range(2):  # whoever says it twice changes nothing
            answer = two.admin("POST", json={"url": f"{url}/"}).json()
            assert (answer["name"], answer["url"]) == (name, url)
        until(lambda: two.state_of(name) == "ready")
        for old in ("engine-0", "engine-1"):
            assert two.admin("DELETE", f"/{old}").status_code == 200
        new.requests.clear()
        assert two.answering() == stored.first
        assert len(new.requests) == 1
        assert two.state_of("engine-0") == "unknown"
        assert 'engine="engine-0"' not in two.http.get("/metrics").text

        last = two.admin("DELETE", f"/{name}")
        assert (last.status_code, "the only engine" in error_of(last)["message"]) == (400, True)


def test_one_with_other_weights_than_are_served_is_not_asked(two: Several) -> None:
    new = FakeEngine(loaded=["other"])
    with fake_at_port(new) as url:
        two.admin("POST", json={"url": url})
        engine = two.pool.engines[2]
        until(lambda: "other weights than it was told to load" in engine.reason)
        assert new.requests != []  # its warm-ups
        assert {two.ask().status_code for _ in range(3)} == {200}
        assert not engine.ready.is_set()
        two.admin("DELETE", f"/{engine.name}")


def test_what_is_no_address_is_refused(two: Several) -> None:
    for url in ("", "10.0.0.5:8001", "ftp://host", "http://host/v1", "http://u:p@host", "http://"):
        response = two.admin("POST", json={"url": url})
        assert (response.status_code, error_of(response)["param"]) == (400, "url")
        assert "http://10.0.0.5:8001" in error_of(response)["message"]


def test_unknown_names_are_refused_and_only_operators_may(two: Several) -> None:
    response = two.admin("POST", json={"url": "http://host", "modle": "x"})
    assert "did you mean model?" in error_of(response)["message"]
    response = two.admin("POST", json={"url": "http://host", "model": "x"})
    assert (response.status_code, error_of(response)["param"]) == (404, "model")
    for method, path in (("DELETE", "/x"), ("POST", "/x/drain"), ("POST", "/x/restart")):
        assert two.admin(method, path).status_code == 404
    assert two.admin("POST", "/engine-0/drain?drain_s=-1").status_code == 400
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/engine-0")):
        assert two.http.request(method, f"/admin/engines{path}").status_code == 401


def test_a_drained_engine_ends_what_it_began(two: Several) -> None:
    for fake in two.fakes:
        fake.seconds_per_piece = 0.02
    answers: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: answers.append(two.ask()))
    asking.start()
    until(lambda: two.pool.engines[0].n_in_flight == 1)
    assert two.admin("POST", "/engine-0/drain?drain_s=20").json()["in_flight"] == 1
    asking.join(timeout=30)
    assert answers[0].status_code == 200
    until(lambda: two.state_of("engine-0") == "stopped")
    assert 'molmo_engine_ready{engine="engine-0"} 0.0' in two.http.get("/metrics").text
    n_asked = len(two.fakes[0].requests)
    assert two.ask().status_code == 200
    assert len(two.fakes[0].requests) == n_asked

    assert two.admin("POST", "/engine-0/restart").status_code == 200
    until(lambda: two.state_of("engine-0") == "ready")


def test_nothing_is_changed_while_weights_are_loaded(two: Several, stored: Stored) -> None:
    for fake in two.fakes:
        fake.seconds_per_piece = 0.5
    second = stored.publish("second")
    loading = threading.Thread(target=two.activate, args=(second,))
    loading.start()
    until(lambda: two.pool.engines[0].state is EngineState.LOADING)
    response = two.admin("DELETE", "/engine-1")
    assert (response.status_code, error_of(response)["code"]) == (503, "busy")
    loading.join(timeout=30)
    assert two.admin("DELETE", "/engine-1").status_code == 200


def test_a_process_of_ours_is_drained_and_started_again(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path, n_engines=2) as service:
        engine = service.pool.engines[0]
        assert isinstance(engine, SupervisedEngine)
        until(lambda: all(one.ready.is_set() for one in service.pool.engines))
        pid = engine.pid
        assert pid is not None
        post = service.http.post
        assert post("/admin/engines/engine-0/drain", headers=ADMIN).status_code == 200
        until(lambda: engine.state is EngineState.STOPPED)
        assert not is_alive(pid)
        second = stored.publish("second")
        assert service.activate(second).status_code == 200  # the other one is exchanged
        assert [e.name for e in service.pool.engines] == ["engine-0", "engine-2"]
        post("/admin/engines/engine-0/restart", headers=ADMIN)
        until(engine.ready.is_set)
        assert engine.pid not in (None, pid)
        assert engine.checkpoint_id == second
        assert engine.n_restarts == 1


def test_an_engine_that_was_given_up_is_tried_again(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    own = partial(FakeEngines, options={stored.first: ["--fail-if", str(tmp_path / "fail")]})
    with serving(stored, tmp_path, own, is_ready=False, max_failed_starts=1) as service:
        until(lambda: service.pool.has_failed)
        (tmp_path / "fail").unlink()
        service.http.post("/admin/engines/engine-0/restart", headers=ADMIN)
        until(lambda: service.pool.is_ready)
        assert service.answering() == stored.first


def test_each_process_of_ours_has_its_devices(stored: Stored, tmp_path: Path) -> None:
    def seen() -> list[str]:
        found = []
        for engine in service.pool.engines:
            assert isinstance(engine, SupervisedEngine)
            variables = Path(f"/proc/{engine.pid}/environ").read_bytes().split(b"\0")
            found += [v.decode() for v in variables if v.startswith(b"CUDA_VISIBLE_DEVICES=")]
        return [one.partition("=")[2] for one in found]

    with serving(stored, tmp_path, n_engines=2, engine_devices="0,1; 2,3") as service:
        until(lambda: all(one.ready.is_set() for one in service.pool.engines))
        assert seen() == ["0,1", "2,3"]
        assert service.activate(stored.publish("second")).status_code == 200
        assert [e.name for e in service.pool.engines] == ["engine-2", "engine-3"]
        assert seen() == ["0,1", "2,3"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_engines": 0}, "there must be one engine"),
        ({"engine_urls": "http://a:1,http://a:1/"}, "names an engine twice"),
        ({"engine_urls": "a:1"}, "it must be as http://10.0.0.5:8001"),
        ({"engine_urls": "http://a:65536"}, "it must be as http://10.0.0.5:8001"),
    ],
)
def test_settings_that_name_no_engines_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MolmoSettings(**fields)


@pytest.mark.parametrize(
    ("fields", "n_own"),
    [
        ({}, 1),
        ({"n_engines": 3}, 3),
        ({"engine_urls": "http://a:1, http://b:2"}, 0),
        ({"engine_urls": "http://a:1", "n_engines": 2}, 2),
    ],
)
def test_own_engines_and_those_of_others(fields: dict[str, Any], n_own: int) -> None:
    assert MolmoSettings(**fields).n_own_engines == n_own
