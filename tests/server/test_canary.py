"""A second engine tried on callers before it takes over: its share, shadows, and what ends it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.engine_pool import SupervisedEngine
from tests.server.exchange import SHAPES, Stored, activate_aside, keep_asking_until, serving
from tests.support.gateway import until


def test_a_canary_gets_its_share_and_reports(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path, canary_share=0.5, canary_s=1) as service:
        second = stored.publish("second")
        events: list[Any] = []
        done = threading.Thread(target=lambda: events.append(service.activate(second).json()))
        done.start()
        answered = keep_asking_until(service, done)
        assert events[0]["outcome"] == "serving"
        canary = events[0]["canary"]
        assert canary["answered"] > 0
        assert canary["failed"] == 0
        assert set(canary["median_s"]) == {"trial", "serving"}
        assert min(answered[one] for one in (stored.first, second)) > 0
        assert canary["answered"] <= answered[second]


@pytest.mark.parametrize(("script", "n_same"), [({}, "all"), ({"shapes": SHAPES}, "none")])
def test_a_shadow_gives_the_same_answers_or_is_refused(
    stored: Stored, tmp_path: Path, script: dict[str, str], n_same: str
) -> None:
    fields = {"shadow_share": 1.0, "canary_s": 1, "least_same": 0.9}
    with serving(stored, tmp_path, **fields) as service:
        second = stored.publish("second")
        service.own.options[second] = ["--script", json.dumps(script)]
        responses: list[httpx2.Response] = []
        done = threading.Thread(target=lambda: responses.append(service.activate(second)))
        done.start()
        answered = keep_asking_until(service, done)
        if n_same == "all":
            canary = responses[0].json()["canary"]
            assert canary["compared"] == canary["same"] > 10
            assert answered[stored.first] >= canary["compared"]
        else:
            assert "otherwise than 90% of the compared answers" in responses[0].text
            assert list(answered) == [stored.first]  # nobody got the other answer
            assert service.answering() == stored.first


def test_a_canary_that_breaks_costs_no_caller_an_answer(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path, canary_share=0.5, canary_s=20) as service:
        second = stored.publish("second")
        responses: list[httpx2.Response] = []
        done = threading.Thread(target=lambda: responses.append(service.activate(second)))
        done.start()
        until(lambda: service.pool.trial is not None and service.pool.trial.share > 0)
        engine = service.pool.trial.engine if service.pool.trial else None
        assert isinstance(engine, SupervisedEngine)
        began = time.monotonic()
        engine._process.kill()
        answered = keep_asking_until(service, done)
        assert time.monotonic() - began < 15
        assert "did not last" in responses[0].text or "it broke on callers" in responses[0].text
        assert answered[stored.first] > 0
        assert service.answering() == stored.first


def test_a_canary_that_refuses_what_the_others_take_is_refused_and_costs_nobody_an_answer(
    stored: Stored, tmp_path: Path
) -> None:
    with serving(stored, tmp_path, canary_share=1.0, canary_s=20) as service:
        short = stored.publish("short", config={"text_config": {"max_position_embeddings": 64}})
        thread, responses = activate_aside(service, short)
        long = [{"role": "user", "content": "shapes " * 20}]
        assert service.answering(messages=long) == stored.first
        thread.join(timeout=30)
        assert "it broke on callers' requests during the canary" in responses[0].text
        assert service.answering() == stored.first


def test_a_request_that_all_refuse_is_no_fault_of_the_canary(
    stored: Stored, tmp_path: Path
) -> None:
    with serving(stored, tmp_path, canary_share=1.0, canary_s=1) as service:
        second = stored.publish("second")
        thread, responses = activate_aside(service, second)
        refused = service.ask(messages=[{"role": "user", "content": "[400]"}])
        assert refused.status_code == 400
        assert service.answering() == second
        thread.join(timeout=30)
        assert responses[0].json()["canary"]["failed"] == 0


def test_a_canary_that_keeps_callers_waiting_until_their_deadline_is_refused(
    stored: Stored, tmp_path: Path
) -> None:
    fields = {"canary_share": 1.0, "canary_s": 20, "deadline_s": 1}
    with serving(stored, tmp_path, **fields) as service:
        second = stored.publish("second")
        thread, responses = activate_aside(service, second)
        late = service.ask(messages=[{"role": "user", "content": "[hang]"}])
        assert late.status_code == 504
        thread.join(timeout=30)
        assert "1 failed" in responses[0].text


def test_nothing_compared_is_no_proof(stored: Stored, tmp_path: Path) -> None:
    fields = {"shadow_share": 1.0, "canary_s": 0.3, "least_same": 0.9}
    with serving(stored, tmp_path, **fields) as service:
        response = service.activate(stored.publish("second"))
        assert "nothing could be compared during the canary" in response.text


def test_an_answer_of_the_canary_is_not_compared_with_itself(
    stored: Stored, tmp_path: Path
) -> None:
    fields = {"shadow_share": 1.0, "canary_s": 1, "least_same": 0.1}
    with serving(stored, tmp_path, **fields) as service:
        second = stored.publish("second")
        thread, responses = activate_aside(service, second)
        while thread.is_alive() and service.pool.trial is not None:
            assert service.ask(model=second).status_code in (200, 404)
        thread.join(timeout=30)
        assert "nothing could be compared" in responses[0].text
