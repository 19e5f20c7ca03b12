"""A second engine beside the first: what it must show, whom it answers, what becomes of the first.

Engines are processes of the scripted engine under the real supervisor.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx2
import pytest

from molmo_server.checkpoints import fit
from molmo_server.engine_pool import EngineState, SupervisedEngine
from molmo_server.settings import MolmoSettings
from tests.server.exchange import (
    ADMIN,
    SHAPES,
    FakeEngines,
    Stored,
    assert_refused,
    serving,
    serving_engine,
)
from tests.server.media import data_url, video
from tests.server.processes import is_alive
from tests.support.gateway import until


def test_a_second_engine_takes_the_place_and_the_first_finishes_what_it_began(
    stored: Stored, tmp_path: Path
) -> None:
    with serving(stored, tmp_path) as service:
        second = stored.publish("second")
        old = serving_engine(service)
        assert old.pid is not None
        old_pid, answers = old.pid, list[str]()

        def ask_slowly() -> None:
            body = {"messages": [{"role": "user", "content": "a [slow] one"}], "stream": True}
            with service.http.stream("POST", "/v1/chat/completions", json=body) as response:
                answers.append(response.headers["x-molmo-checkpoint"])
                answers.append(response.read().decode())

        early = threading.Thread(target=ask_slowly)
        early.start()
        until(lambda: old.n_in_flight == 1)
        event = service.activate(second).json()
        assert (event["outcome"], event["reason"]) == ("serving", "activated on a second engine")
        assert service.answering() == second
        early.join(timeout=30)
        assert answers[0] == stored.first
        assert answers[1].endswith("data: [DONE]\n\n")
        until(lambda: not is_alive(old_pid))
        assert service.state_of(second) == ("serving", None)
        assert service.state_of(stored.first) == ("stored", None)
        back = service.http.post("/admin/checkpoints/rollback", headers=ADMIN).json()
        assert back["checkpoint"] == stored.first == service.answering()
        assert serving_engine(service).name == "engine-2"


def test_nobody_is_refused_while_engines_change_places(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path) as service:
        ids = [stored.first, stored.publish("second")]
        answered: Counter[str] = Counter()
        is_over = threading.Event()

        def keep_asking() -> None:
            while not is_over.is_set():
                answered[service.answering()] += 1

        callers = [threading.Thread(target=keep_asking) for _ in range(4)]
        for caller in callers:
            caller.start()
        for number in range(4):
            response = service.activate(ids[(number + 1) % 2])
            assert response.status_code == 200, response.text
        is_over.set()
        for caller in callers:
            caller.join(timeout=30)
            assert not caller.is_alive()
        assert set(answered) == set(ids)  # an answer that is no 200 would have ended its caller
        assert min(answered.values()) > 10


def test_another_geometry_needs_a_second_engine_and_gets_it(stored: Stored, tmp_path: Path) -> None:
    """Also what the gateway knows of it changes: the frames it looks at, the longest prompt."""
    with serving(stored, tmp_path, swap_way="auto") as service:
        wide = stored.publish(
            "wide",
            config={"text_config": {"max_position_embeddings": 8192}},
            video_preprocessor_config={"num_frames": 3},
        )
        film = {"video_url": data_url(video(n_frames=50), "video/mp4"), "object": "x"}

        def n_frames() -> int:
            response = service.http.post("/v1/track", json=film)
            assert response.status_code == 200, response.text
            return len(response.json()["frames"])

        before = n_frames()
        assert service.activate(wide).json()["reason"] == "activated on a second engine"
        assert service.http.get("/v1/models").json()["data"][0]["max_model_len"] == 8192
        assert n_frames() == 3 < before
        long = service.ask(messages=[{"role": "user", "content": "word " * 1000}])
        assert long.status_code == 200
        back = service.activate(stored.first).json()
        assert back["reason"] == "activated on a second engine"
        long = service.ask(messages=[{"role": "user", "content": "word " * 1000}])
        assert long.status_code == 400


def test_equal_geometry_is_loaded_in_place_unless_told_otherwise(
    stored: Stored, tmp_path: Path
) -> None:
    with serving(stored, tmp_path, swap_way="auto") as service:
        pid = serving_engine(service).pid
        assert service.activate(stored.publish("second")).json()["reason"] == "activated in place"
        assert serving_engine(service).pid == pid


def test_what_does_not_start_does_not_serve(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with serving(stored, tmp_path) as service:
        second = stored.publish("second")
        service.own.options[second] = ["--fail-if", str(tmp_path / "fail")]
        assert_refused(service, stored, second, "a second engine did not start with it")


def test_what_does_not_answer_as_published_does_not_serve(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path) as service:
        second = stored.publish("second")
        service.own.options[second] = ["--logprob", "nan"]
        assert_refused(service, stored, second, "does not answer as published (probe 0")


def test_a_tokenizer_that_is_not_the_models_does_not_serve(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path) as service:
        second = stored.publish("second", config={"image_patch_id": 3})
        assert_refused(service, stored, second, "image_patch_id of config.json is 3")


def test_another_mask_than_in_training_does_not_serve(stored: Stored, tmp_path: Path) -> None:
    with serving(stored, tmp_path) as service:
        second = stored.publish("second", config={"bidirectional": "none"})
        assert_refused(service, stored, second, "config.json says 'none'")


def test_without_memory_for_two_the_first_stays(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_free_memory", lambda: 1)
    with serving(stored, tmp_path, swap_way="auto") as service:
        other = stored.publish("other", config={"extra": 1})
        assert_refused(service, stored, other, "a second engine needs about")


def gate(tmp_path: Path, code: str) -> str:
    """A command that runs `code` with the environment in `env`."""
    path = tmp_path / "gate.py"
    path.write_text(f"import json, os, sys, urllib.request\nenv = os.environ\n{code}\n")
    return f"{sys.executable} {path}"


ASKS_BOTH = """
def ask(model):
    body = {"model": model, "messages": [{"role": "user", "content": "shapes"}]}
    url = env["MOLMO_SERVER"] + "/v1/chat/completions"
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))
old, new = (ask(env["MOLMO_GATE_" + name]) for name in ("CURRENT", "CANDIDATE"))
assert old["system_fingerprint"] == env["MOLMO_GATE_CURRENT"]
assert new["system_fingerprint"] == env["MOLMO_GATE_CANDIDATE"]
if "total of 2" not in new["choices"][0]["message"]["content"]:
    sys.exit("worse: it counts " + new["choices"][0]["message"]["content"])
"""


def test_the_gate_asks_both_and_decides(stored: Stored, tmp_path: Path) -> None:
    fields = {"swap_way": "auto", "gate_command": gate(tmp_path, ASKS_BOTH)}
    with serving(stored, tmp_path, **fields) as service:
        worse, better = stored.publish("worse"), stored.publish("better")
        service.own.options[better] = ["--script", json.dumps({"shapes": SHAPES})]
        assert_refused(service, stored, worse, "exit code 1: worse: it counts Counting the")
        event = service.activate(better).json()
        assert event["outcome"] == "serving"
        assert event["seconds"]["gate"] > 0
        assert service.answering() == better


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/no/such/command"], "the gate '/no/such/command' cannot be run"),
        ([sys.executable, "-c", "'import time; time.sleep(60)'"], "the gate took longer than 1 s"),
    ],
)
def test_a_gate_that_cannot_decide_does_not_let_pass(
    stored: Stored, tmp_path: Path, command: list[str], why: str
) -> None:
    with serving(stored, tmp_path, gate_command=" ".join(command), gate_s=1) as service:
        assert_refused(service, stored, stored.publish("second"), why)


def test_a_gate_and_in_place_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="gate_command needs a second engine"):
        MolmoSettings(swap_way="in_place", gate_command="true")


def test_an_engine_on_trial_ends_with_the_service(stored: Stored, tmp_path: Path) -> None:
    with ExitStack() as stack:
        fields = {"gate_command": f"{sys.executable} -c 'import time; time.sleep(60)'"}
        service = stack.enter_context(serving(stored, tmp_path, **fields))
        second = stored.publish("second")

        def activate() -> None:
            with suppress(httpx2.HTTPError):  # the service ends before it answers
                service.activate(second)

        asking = threading.Thread(target=activate)
        asking.start()
        until(lambda: service.pool.trial is not None and service.pool.trial.is_open)
        assert service.answering(model=second) == second
        assert service.answering() == stored.first
        trial = service.pool.trial
        assert trial is not None
        assert isinstance(trial.engine, SupervisedEngine)
        pid = trial.engine.pid
        assert pid is not None
        stack.close()
        asking.join(timeout=30)
        until(lambda: not is_alive(pid))


def test_a_start_takes_the_latest_that_is_in_order(stored: Stored, tmp_path: Path) -> None:
    second, third = stored.publish("second"), stored.publish("third")
    weights = stored.store.folder_of(third) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with serving(stored, tmp_path) as service:
        assert service.answering() == second


def test_an_engine_that_does_not_answer_as_published_never_becomes_ready(
    stored: Stored, tmp_path: Path
) -> None:
    own = partial(FakeEngines, options={stored.first: ["--logprob", "-3"]})
    fields = {"max_failed_starts": 2, "first_backoff_s": 0.05, "own": own}
    with serving(stored, tmp_path, is_ready=False, **fields) as service:
        until(lambda: serving_engine(service).state is EngineState.FAILED)
        response = service.http.get("/ready")
        assert response.status_code == 503
        assert "it does not answer as published (probe 0: the log-prob" in response.text
