"""Other weights under live traffic: who answers what, what is refused, how it comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_core.checkpoints import FolderStore, Probe
from molmo_server.checkpoints.fit import differences
from molmo_server.engine_pool.fake import FakeEngine, question_of
from molmo_server.engine_pool.probing import compare_probe
from molmo_server.engine_pool.swap import SwapLimits, Weights, swap_in_place
from tests.server.processes import fake_process
from tests.support.gateway import RunningGateway, events_of, running_gateway, until, write_folder

KEY = "secret"
ADMIN = {"authorization": f"Bearer {KEY}"}
PROBE = Probe(question="Hi", answer_ids=(7, 7), logprobs=(-1.0, -1.0))


def publish(store: FolderStore, seed: int, probes: tuple[Probe, ...] = (PROBE,)) -> str:
    with store.staging() as staged:
        folder = write_folder(staged / "checkpoint")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([seed]))
        return store.publish(
            folder,
            name="tiny",
            source="run",
            code_version="0",
            created=0.0,
            bidirectional="all",
            probes=probes,
        ).id


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def first(store: FolderStore) -> str:
    return publish(store, 0)


@pytest.fixture
def gateway(store: FolderStore, first: str, tmp_path: Path) -> Iterator[RunningGateway]:
    """Serves `first`, and follows the store."""
    with running_gateway(
        None, tmp_path, FakeEngine(), store=str(store.folder), admin_key=KEY
    ) as running:
        yield running


def state(gateway: RunningGateway) -> dict[str, Any]:
    response = gateway.http.get("/admin/checkpoints", headers=ADMIN)
    assert response.status_code == 200
    content: dict[str, Any] = response.json()
    return content


def activate(gateway: RunningGateway, checkpoint_id: str) -> httpx2.Response:
    path = f"/admin/checkpoints/{checkpoint_id}/activate"
    return gateway.http.post(path, headers=ADMIN)


def who_answers(gateway: RunningGateway) -> str:
    """The checkpoint of an answer; header, body and model list must agree."""
    response = gateway.chat("red circle")
    served: str = response.json()["system_fingerprint"]
    assert response.headers["x-molmo-checkpoint"] == served
    assert gateway.http.get("/v1/models").json()["data"][0]["checkpoint"] == served
    assert gateway.http.get("/ready").json()["checkpoint"] == served
    assert f'molmo_checkpoint{{id="{served}"}} 1.0' in gateway.http.get("/metrics").text
    return served


def test_what_becomes_current_in_the_store_is_served(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    assert who_answers(gateway) == first
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    assert who_answers(gateway) == second
    assert gateway.engine.loaded == [second]
    assert state(gateway)["previous"] == first
    assert store.live() == {first, second}  # retention leaves both
    assert store.retire(1) == []
    store.set_current(first)
    until(lambda: state(gateway)["current"] == first)
    assert who_answers(gateway) == first


def test_requests_in_flight_end_on_their_weights_and_later_ones_wait(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    gateway.engine.script["early"] = "many words " * 30  # four seconds
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        events = events_of(gateway.stream_bytes(f"{name} [slow]"))
        fingerprints = {event["system_fingerprint"] for event in events[-1:]}
        answers[name] = fingerprints.pop()

    early = threading.Thread(target=ask, args=("early",))
    early.start()
    until(lambda: question_of(gateway.engine.requests[-1]).startswith("early"))
    loading = threading.Thread(target=activate, args=(gateway, first))
    loading.start()
    until(lambda: not gateway.is_ready())  # the engine takes no more; "early" is on its way
    late = threading.Thread(target=ask, args=("late",))
    late.start()
    for thread in (early, loading, late):
        thread.join(timeout=30)
    assert answers == {"early": second, "late": first}


def test_a_second_change_meanwhile_is_told_to_wait(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    gateway.engine.seconds_per_piece = 0.5
    second = publish(store, 1)
    until(lambda: state(gateway)["is_loading"])
    response = activate(gateway, second)
    assert response.status_code == 503
    assert "another checkpoint is being loaded" in response.json()["error"]["message"]
    until(lambda: state(gateway)["current"] == second)


def assert_refused(gateway: RunningGateway, checkpoint_id: str, served: str, why: str) -> None:
    response = activate(gateway, checkpoint_id)
    assert response.status_code == 500
    assert why in response.json()["error"]["message"]
    refused = [e for e in state(gateway)["history"] if e["checkpoint"] == checkpoint_id]
    assert refused[-1]["outcome"] == "refused"
    assert why in refused[-1]["reason"]
    assert who_answers(gateway) == served


def stored_without_pointing(store: FolderStore, first: str, seed: int, **fields: Any) -> str:
    """Published, and the pointer put back before the server looks."""
    pointer = store.folder / "CURRENT"
    before = pointer.read_bytes()
    published = publish(store, seed, **fields)
    pointer.write_bytes(before)
    return published


@pytest.fixture
def unfollowing(store: FolderStore, first: str, tmp_path: Path) -> Iterator[RunningGateway]:
    fields = {"store": str(store.folder), "admin_key": KEY, "follows_store": False}
    with running_gateway(None, tmp_path, FakeEngine(), **fields) as running:
        yield running


def test_an_engine_that_cannot_load_serves_the_old_one(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    unfollowing.engine.load_statuses = [409]
    assert_refused(unfollowing, second, first, "could not load")
    assert activate(unfollowing, second).status_code == 200
    assert who_answers(unfollowing) == second
    assert [e["outcome"] for e in state(unfollowing)["history"]] == ["refused", "serving"]


def test_weights_that_answer_otherwise_than_published_are_put_back(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    unfollowing.engine.logprobs = {second: -1.5}
    assert_refused(
        unfollowing, second, first, "log-probability of token 0 is -1.5000, published -1.0000"
    )
    assert unfollowing.engine.loaded == [second, first]
    refused = state(unfollowing)["history"][0]
    assert refused["reason"].endswith(f"{first} was put back")


def test_when_the_old_ones_cannot_be_put_back_nobody_gets_the_new_ones(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    unfollowing.engine.logprobs = {second: -1.5}
    unfollowing.engine.load_statuses = [200, 409]
    response = activate(unfollowing, second)
    assert f"{first} could not be put back" in response.json()["error"]["message"]
    for _ in range(5):
        assert unfollowing.http.get("/ready").status_code == 503
        time.sleep(0.05)


def test_an_engine_that_comes_back_with_other_weights_takes_no_requests(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    assert activate(unfollowing, second).status_code == 200
    assert unfollowing.is_ready()
    unfollowing.engine.loaded.clear()  # as if its owner had started it again
    until(lambda: not unfollowing.is_ready())
    reason = unfollowing.http.get("/ready").json()["error"]["message"]
    assert "other weights than it was told to load" in reason
    time.sleep(0.3)
    assert not unfollowing.is_ready()


def test_a_probe_that_cannot_be_answered_is_no_pass(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    probe = Probe(question="[500]", answer_ids=(7,), logprobs=(-1.0,))
    second = publish(store, 1, probes=(probe,))
    assert_refused(unfollowing, second, first, "probe 0 was not answered")


def test_requests_that_do_not_end_stop_the_change_and_nothing_else(
    store: FolderStore, first: str, tmp_path: Path
) -> None:
    fields = {"store": str(store.folder), "admin_key": KEY, "follows_store": False}
    engine = FakeEngine()
    with running_gateway(None, tmp_path, engine, swap_drain_s=0.3, **fields) as running:
        second = publish(store, 1)
        engine.seconds_per_piece = 0.1
        asking = threading.Thread(target=running.stream_bytes, args=("a [slow] one",))
        asking.start()
        until(lambda: len(engine.requests) > 0)
        message = activate(running, second).json()["error"]["message"]
        assert "1 requests were still in flight after 0.3 s; nothing was loaded" in message
        asking.join(timeout=30)
        assert who_answers(running) == first
        assert engine.loaded == []


def test_whoever_names_a_checkpoint_gets_no_other(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    assert gateway.chat("red circle", model=first).status_code == 200
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    assert gateway.chat("red circle", model=first).status_code == 404
    assert gateway.chat("red circle", model=second).status_code == 200
    assert gateway.chat("red circle", model="molmo2").status_code == 200


def test_an_unknown_one_is_not_found(gateway: RunningGateway, first: str) -> None:
    response = activate(gateway, "other")
    assert response.status_code == 404
    assert f"the last ones of the store are: {first}" in response.json()["error"]["message"]


def test_an_engine_with_unknown_weights_takes_no_requests(
    unfollowing: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    unfollowing.engine.load_statuses = [500]
    response = activate(unfollowing, second)
    assert "the engine was lost while loading" in response.json()["error"]["message"]
    for _ in range(5):  # health is good, and yet
        response = unfollowing.http.get("/ready")
        assert response.status_code == 503
        assert "weights are unknown" in response.json()["error"]["message"]
        time.sleep(0.05)
    assert unfollowing.chat("red circle").status_code == 503


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", None, "tokenizer.json differs"),
        ("config.json", '{"text_config": {"max_position_embeddings": 64}}', "config.json differs"),
        ("model.safetensors", "shape", "a is ('F32', (2, 512)), running is ('F32', (1024,))"),
        ("model.safetensors", "name", "1 tensors are missing, as a"),
    ],
)
def test_what_does_not_fit_is_never_loaded(
    unfollowing: RunningGateway,
    store: FolderStore,
    first: str,
    name: str,
    content: str | None,
    why: str,
) -> None:
    with store.staging() as staged:
        folder = write_folder(staged / "checkpoint")
        path = folder / name
        whole = path.read_bytes()
        if content == "shape":
            whole = whole.replace(b"[1024]", b"[2, 512]").replace(b"\x47", b"\x49", 1)
            whole = (len(whole) - 8 - 4096).to_bytes(8, "little") + whole[8:]
            path.write_bytes(whole)
        elif content == "name":
            path.write_bytes(whole.replace(b'"a"', b'"b"'))
        else:
            path.write_bytes(whole + b"\n" if content is None else content.encode())
        other = store.publish(
            folder, name="tiny", source="run", code_version="0", created=0.0, bidirectional="all"
        ).id
    assert_refused(unfollowing, other, first, why)
    assert unfollowing.engine.loaded == []


def test_an_altered_checkpoint_is_never_loaded(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    third = publish(store, 2)
    until(lambda: state(gateway)["current"] == third)
    weights = store.folder_of(first) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x09")
    assert_refused(gateway, first, third, "its SHA-256 differs")
    (store.folder / "CURRENT").write_text(f"{first}\n")  # nor when the pointer says so
    time.sleep(2.5)
    assert who_answers(gateway) == third


def test_a_pointer_to_nothing_is_told_once_and_survived(
    gateway: RunningGateway, store: FolderStore, first: str
) -> None:
    (store.folder / "CURRENT").write_text("../../etc\n")
    until(lambda: len(state(gateway)["history"]) == 1)
    assert "which is no id" in state(gateway)["history"][0]["reason"]
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    assert len(state(gateway)["history"]) == 2


def test_rolling_back_in_one_call(gateway: RunningGateway, store: FolderStore, first: str) -> None:
    post = gateway.http.post
    assert post("/admin/checkpoints/rollback", headers=ADMIN).status_code == 404
    second = publish(store, 1)
    until(lambda: state(gateway)["current"] == second)
    assert post("/admin/checkpoints/rollback", headers=ADMIN).json()["checkpoint"] == first
    assert who_answers(gateway) == first
    time.sleep(1.5)
    assert who_answers(gateway) == first  # the pointer says otherwise, and was heard before
    outcomes = [event["outcome"] for event in state(gateway)["history"]]
    assert outcomes == ["superseded", "serving"]


def test_an_engine_of_ours_must_be_told_how_it_starts_with_the_new_ones(tmp_path: Path) -> None:
    async def swap() -> None:
        weights = Weights(folder=tmp_path, id="a")
        limits = SwapLimits()
        await swap_in_place(fake_process(tmp_path), weights, weights, model="m", limits=limits)

    with pytest.raises(ValueError, match="how it starts with the new weights"):
        asyncio.run(swap())


def test_the_key(gateway: RunningGateway, first: str, tmp_path: Path) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": ""}):
        response = gateway.http.get("/admin/checkpoints", headers=headers)
        assert response.status_code == 401
        assert "key is missing or wrong" in response.json()["error"]["message"]
    folder = write_folder(tmp_path / "keyless")
    (tmp_path / "other").mkdir()
    with running_gateway(folder, tmp_path / "other") as keyless:
        response = keyless.http.get("/admin/checkpoints", headers=ADMIN)
        assert response.status_code == 401
        assert "MOLMO_ADMIN_KEY" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        (({7: -1.0}, {7: -1.0}), None),
        (({7: -1.009, 1: -2.0}, {7: -0.991}), None),
        (({7: -1.0}, {7: -1.02}), "token 1 is -1.0200, published -1.0000"),
        (({7: -1.0},), "ends after 1 tokens, published are 2"),
        (({7: -1.0}, {7: None}), "token 1 is 7, published is 7"),
        (({7: float("nan")}, {7: -1.0}), "token 0 is 7, published is 7"),
        (({8: -1.0, 7: -1.0}, {1: -9.0}), None),  # as probable: another choice is no fault
        (({8: -0.001, 7: -7.0}, {7: -1.0}), "token 0 is -7.0000, published -1.0000"),
        (({8: -1.0, 9: -1.0}, {7: -1.0}), "token 0 is 8, published is 7"),
    ],
)
def test_probes_are_compared_token_by_token(
    tables: tuple[dict[int, float | None], ...], why: str | None
) -> None:
    found = compare_probe(PROBE, tables, 1e-2)
    assert found is None if why is None else why in str(found)


def test_a_probe_without_a_number_for_each_token_is_none() -> None:
    with pytest.raises(ValueError, match="2 answer_ids and 1 logprobs"):
        Probe(question="Hi", answer_ids=(1, 2), logprobs=(-1.0,))


def test_equal_folders_do_not_differ(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert differences(a, b) == []
    (b / "config.json").write_text(
        '{"transformers_version": "9", "text_config": {"max_position_embeddings": 4096}}'
    )
    assert differences(a, b) == []
