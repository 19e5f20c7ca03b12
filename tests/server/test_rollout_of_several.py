"""Other weights for several engines: one after the other, all or none, each answer by its name."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from molmo_server.engine_pool import EngineState, SupervisedEngine
from tests.server.exchange import Service, Stored, serving
from tests.server.several import ADMIN, Several, several
from tests.support.gateway import until


@pytest.fixture
def two(stored: Stored, tmp_path: Path) -> Iterator[Several]:
    with several(tmp_path, store=str(stored.store.folder), follows_store=False) as running:
        yield running


def test_all_engines_get_the_new_weights_in_place(two: Several, stored: Stored) -> None:
    second = stored.publish("second")
    event = two.activate(second).json()
    assert (event["outcome"], event["reason"]) == ("serving", "activated in place")
    assert {key.split()[0] for key in event["seconds"]} == {"engine-0", "engine-1"}
    assert [fake.loaded for fake in two.fakes] == [[second], [second]]
    assert {engine.checkpoint_id for engine in two.pool.engines} == {second}
    assert two.answering() == second


def test_while_one_loads_the_other_answers_and_both_can_be_named(
    two: Several, stored: Stored
) -> None:
    second = stored.publish("second")
    two.fakes[1].seconds_per_piece = 1.0  # so long its load takes
    responses: list[httpx2.Response] = []
    loading = threading.Thread(target=lambda: responses.append(two.activate(second)))
    loading.start()
    until(lambda: two.pool.engines[1].state is EngineState.LOADING)
    assert two.answering() == second  # the first engine has it already
    assert two.answering(model=second) == second
    asked_for_old: list[int] = []

    def ask_for_old() -> None:
        asked_for_old.append(two.ask(model=stored.first).status_code)

    waiting = threading.Thread(target=ask_for_old)
    waiting.start()
    loading.join(timeout=30)
    waiting.join(timeout=30)
    assert responses[0].json()["outcome"] == "serving"
    assert asked_for_old == [404]  # served no more when its turn came
    assert two.answering(model=second) == second


def test_nobody_is_refused_while_engines_are_changed(two: Several, stored: Stored) -> None:
    ids = [stored.first, stored.publish("second")]
    answered: Counter[str] = Counter()
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            answered[two.answering()] += 1

    callers = [threading.Thread(target=keep_asking) for _ in range(3)]
    for caller in callers:
        caller.start()
    for number in range(6):
        response = two.activate(ids[(number + 1) % 2])
        assert response.status_code == 200, response.text
    is_over.set()
    for caller in callers:
        caller.join(timeout=30)
        assert not caller.is_alive()
    assert set(answered) == set(ids)


def test_when_a_later_engine_fails_the_earlier_ones_go_back(two: Several, stored: Stored) -> None:
    second = stored.publish("second")
    two.fakes[1].load_statuses = [409]
    response = two.activate(second)
    assert "could not load" in response.json()["error"]["message"]
    assert two.fakes[0].loaded == [second, stored.first]
    assert {engine.checkpoint_id for engine in two.pool.engines} == {stored.first}
    assert two.answering() == stored.first
    assert two.ask(model=second).status_code == 404


def test_an_engine_that_was_drained_gets_them_before_it_answers_again(
    two: Several, stored: Stored
) -> None:
    assert two.admin("POST", "/engine-1/drain").status_code == 200
    until(lambda: two.state_of("engine-1") == "stopped")
    second = stored.publish("second")
    assert two.activate(second).json()["outcome"] == "serving"
    assert [fake.loaded for fake in two.fakes] == [[second], []]
    two.admin("POST", "/engine-1/restart")
    engine = two.pool.engines[1]
    until(lambda: "other weights than it was told to load" in engine.reason)
    assert not engine.ready.is_set()
    two.fakes[1].loaded.append(second)  # whoever runs it has started it with them
    until(engine.ready.is_set)


def test_an_engine_that_is_gone_does_not_hold_up_the_others(two: Several, stored: Stored) -> None:
    two.fakes[1].is_healthy = False
    until(lambda: two.state_of("engine-1") == "starting")
    second = stored.publish("second")
    assert two.activate(second).json()["outcome"] == "serving"
    two.fakes[1].is_healthy = True
    until(lambda: "other weights" in two.pool.engines[1].reason)
    assert two.answering() == second


def pids(service: Service) -> list[int | None]:
    return [e.pid for e in service.pool.engines if isinstance(e, SupervisedEngine)]


def test_second_engines_take_the_places_one_after_the_other(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path, n_engines=2) as service:
        until(lambda: all(engine.ready.is_set() for engine in service.pool.engines))
        wide = stored.publish("wide", config={"text_config": {"max_position_embeddings": 8192}})
        answered: Counter[str] = Counter()
        is_over = threading.Event()

        def keep_asking() -> None:
            while not is_over.is_set():
                answered[service.answering()] += 1

        caller = threading.Thread(target=keep_asking)
        caller.start()
        event = service.activate(wide).json()
        assert (event["outcome"], event["reason"]) == ("serving", "activated on a second engine")
        is_over.set()
        caller.join(timeout=30)
        assert set(answered) == {stored.first, wide}
        assert [engine.name for engine in service.pool.engines] == ["engine-2", "engine-3"]
        assert {engine.checkpoint_id for engine in service.pool.engines} == {wide}
        assert service.answering() == wide
        until(lambda: len(list(service.own.socket_dir.glob("*.sock"))) == 2)


def test_when_a_later_second_engine_fails_the_first_checkpoint_is_everywhere_again(
    stored: Stored, tmp_path: Path
) -> None:
    with serving(stored, tmp_path, n_engines=2) as service:
        until(lambda: all(engine.ready.is_set() for engine in service.pool.engines))
        untouched = pids(service)[1]
        second = stored.publish("second")
        marker = tmp_path / "fail"
        service.own.options[second] = ["--fail-if", str(marker), "--then-touch", str(marker)]
        response = service.activate(second)
        assert "a second engine did not start with it" in response.json()["error"]["message"]
        assert [engine.name for engine in service.pool.engines] == ["engine-4", "engine-1"]
        assert pids(service)[1] == untouched
        assert {engine.checkpoint_id for engine in service.pool.engines} == {stored.first}
        assert service.answering() == stored.first
        assert service.state_of(second)[0] == "refused"
        assert service.http.get("/admin/engines", headers=ADMIN).json()["ready"] == 2
