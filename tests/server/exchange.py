"""Services whose second engine is a process of the scripted engine, and checkpoints for them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from molmo_core.checkpoints import FolderStore, Probe
from molmo_server.checkpoints.configured import first_checkpoint
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.engine_pool import EnginePool, EngineProcess, SupervisedEngine
from molmo_server.engines import OwnEngines, build_pool
from molmo_server.settings import MolmoSettings
from tests.server.processes import fake_command
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


def keep_asking_until(service: Service, done: threading.Thread) -> Counter[str]:
    answered: Counter[str] = Counter()
    while done.is_alive():
        answered[service.answering()] += 1
    return answered


def activate_aside(service: Service, checkpoint_id: str) -> tuple[threading.Thread, list[Any]]:
    """The change goes on; the thread ends with it, its answer is then in the list."""
    responses: list[Any] = []
    thread = threading.Thread(target=lambda: responses.append(service.activate(checkpoint_id)))
    thread.start()
    until(lambda: service.pool.trial is not None and service.pool.trial.is_open)
    return thread, responses
