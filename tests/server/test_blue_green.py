"""A second engine beside the first: what it must show, whom it answers, what becomes of the first.

Engines are processes of the scripted engine under the real supervisor.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_core.checkpoints import FolderStore, Probe
from molmo_server.checkpoints import fit
from molmo_server.checkpoints.configured import first_checkpoint
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.engine_pool import EnginePool, EngineProcess, EngineState, SupervisedEngine
from molmo_server.engines import OwnEngines, build_pool
from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, video
from tests.server.processes import fake_command, is_alive
from tests.support.gateway import serve_in_thread, until, write_folder

KEY = "secret"
ADMIN = {"authorization": f"Bearer {KEY}"}
PROBE = Probe(question="Hi", answer_ids=(7,), logprobs=(-1.0,))
SHAPES = "Counting shows a total of 2."


@dataclass(frozen=True, kw_only=True)
class FakeEngines(OwnEngines):
    """Scripted processes; `options` by checkpoint: more arguments of theirs."""

    options: dict[str, list[str]] = field(default_factory=dict)

    def process(self, checkpoint: Checkpoint, name: str) -> EngineProcess:
        socket = self.socket_dir / f"{name}.sock"
        argv = fake_command(socket, *self.options.get(checkpoint.id, []))
        return EngineProcess(
            argv=argv,
            socket=socket,
            log=self.log_dir / f"{name}.log",
            examine=self.examination(checkpoint),
        )


@dataclass(kw_only=True)
class Service:
    http: httpx2.Client
    own: FakeEngines
    pool: EnginePool

    def activate(self, checkpoint_id: str) -> httpx2.Response:
        return self.http.post(f"/admin/checkpoints/{checkpoint_id}/activate", headers=ADMIN)

    def ask(self, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": "shapes"}], "temperature": 0, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def answering(self, **fields: Any) -> str:
        response = self.ask(**fields)
        assert response.status_code == 200, response.text
        answered: str = response.json()["system_fingerprint"]
        assert response.headers["x-molmo-checkpoint"] == answered
        return answered

    def state_of(self, checkpoint_id: str) -> tuple[str, str | None]:
        rows = self.http.get("/admin/checkpoints", headers=ADMIN).json()["checkpoints"]
        (row,) = [row for row in rows if row["id"] == checkpoint_id]
        return row["state"], row["reason"]


@dataclass(kw_only=True)
class Stored:
    store: FolderStore
    first: str

    def publish(self, name: str, *, config: dict[str, Any] | None = None, **files: Any) -> str:
        """A checkpoint that differs in its name's letters, or in its configuration."""
        with self.store.staging() as staged:
            folder = write_folder(staged / "checkpoint")
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: -len(name)] + name.encode())
            if config:
                fields = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps(fields | config))
            for file, fields in files.items():
                path = folder / f"{file}.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | fields))
            return self.store.publish(
                folder,
                name=name,
                source="run",
                code_version="0",
                created=0.0,
                bidirectional="all",
                probes=(PROBE,),
            ).id


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    found = Stored(store=FolderStore(tmp_path / "store"), first="")
    found.first = found.publish("first")
    return found


@contextmanager
def serving(
    stored: Stored,
    folder: Path,
    own: Callable[..., FakeEngines] = FakeEngines,
    is_ready: bool = True,
    **fields: Any,
) -> Iterator[Service]:
    """The first checkpoint is served; what is published later is not followed."""
    settings = MolmoSettings(
        store=str(stored.store.folder),
        cache_dir=folder / "cache",
        admin_key=KEY,
        follows_store=False,
        health_interval_s=0.05,
        start_timeout_s=30,
        drain_s=1,
        **{"swap_way": "blue_green", **fields},
    )
    sockets = folder / "s"
    sockets.mkdir()
    engines_of = own(settings=settings, socket_dir=sockets, log_dir=sockets)
    pools: list[EnginePool] = []

    def engines() -> EnginePool:
        pools.append(build_pool(settings, first_checkpoint(settings), engines_of))
        return pools[0]

    with serve_in_thread(settings, engines, engines_of) as url, httpx2.Client(base_url=url) as http:
        http.timeout = httpx2.Timeout(60)
        until(lambda: not is_ready or http.get("/ready").status_code == 200)
        yield Service(http=http, own=engines_of, pool=pools[0])


def serving_engine(service: Service) -> SupervisedEngine:
    (engine,) = service.pool.engines
    assert isinstance(engine, SupervisedEngine)
    return engine


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


def assert_refused(service: Service, stored: Stored, checkpoint_id: str, why: str) -> None:
    """The first engine serves on, nothing of the second is left, and the reason stays readable."""
    pid = serving_engine(service).pid
    response = service.activate(checkpoint_id)
    assert response.status_code == 500
    assert why in response.json()["error"]["message"]
    state, reason = service.state_of(checkpoint_id)
    assert state == "refused"
    assert why in str(reason)
    assert service.answering() == stored.first
    assert serving_engine(service).pid == pid
    assert service.ask(model=checkpoint_id).status_code == 404
    until(lambda: len(list(service.own.socket_dir.glob("*.sock"))) == 1)


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


def keep_asking_until(service: Service, done: threading.Thread) -> Counter[str]:
    answered: Counter[str] = Counter()
    while done.is_alive():
        answered[service.answering()] += 1
    return answered


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
        engine._process.kill()  # type: ignore[union-attr]
        answered = keep_asking_until(service, done)
        assert time.monotonic() - began < 15
        assert "did not last" in responses[0].text or "it broke on callers" in responses[0].text
        assert answered[stored.first] > 0
        assert service.answering() == stored.first


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


def activate_aside(service: Service, checkpoint_id: str) -> tuple[threading.Thread, list[Any]]:
    """The change goes on; the thread ends with it, its answer is then in the list."""
    responses: list[Any] = []
    thread = threading.Thread(target=lambda: responses.append(service.activate(checkpoint_id)))
    thread.start()
    until(lambda: service.pool.trial is not None and service.pool.trial.is_open)
    return thread, responses


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
