"""A server that is killed in the middle of a batch goes on where it was: a line has one answer."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from molmo_core.api_batches import Batch, BatchList
from molmo_server.engine_pool.fake import FakeEngine, Trick
from tests.server.batches import CHAT, batch_of, ended, jsonl, line, results, upload
from tests.server.killed import Order, Servers, servers
from tests.support.gateway import RunningGateway, run_fake, until

N_CONCURRENT = 4
MOST_LINES = 1500
_JOBS = "molmo_server.batches.jobs:JobStore"
_FOLDER = "molmo_server.batches.folder:BatchFolder"
AT_THE_BEGINNING = [
    Order(step=f"{_JOBS}.{name}", nth=nth, is_after=is_after)
    for name, nth in (("checked", 1), ("keep", 3))
    for is_after in (False, True)
]
AT_THE_END = [
    Order(step=step, nth=nth, is_after=is_after)
    for step, nth in (
        (f"{_JOBS}.finalize", 1),
        (f"{_FOLDER}.keep", 1),
        (f"{_FOLDER}.keep", 2),
        (f"{_JOBS}.end", 1),
    )
    for is_after in (False, True)
]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(script={f"number {k}.": f"answer {k}" for k in range(MOST_LINES)})
    with run_fake(engine, tmp_path / "engine.sock"):
        yield engine


@pytest.fixture
def killed(folder: Path, tmp_path: Path, engine: FakeEngine) -> Iterator[Servers]:
    with servers(folder, tmp_path / "engine.sock", tmp_path / "batches") as started:
        yield started


def is_refused(number: int) -> bool:
    return number % 10 == 9


def lines(n_lines: int) -> list[dict[str, object]]:
    return [
        line(f"{k}", f"{Trick.REFUSE if is_refused(k) else ''} number {k}.") for k in range(n_lines)
    ]


@pytest.mark.parametrize(
    ("n_lines", "n_kills"), [(100, 6), pytest.param(MOST_LINES, 120, marks=pytest.mark.soak)]
)
def test_each_line_is_answered_once(
    killed: Servers, engine: FakeEngine, tmp_path: Path, n_lines: int, n_kills: int
) -> None:
    engine.seconds_per_piece = 0.02
    address, _ = killed.start(Order(step="molmo_server.batches.runner:Runner.take", is_after=False))
    gateway = RunningGateway(url=address, engine=engine)
    with gateway.http:
        until(gateway.is_ready)
        file_id = upload(gateway, jsonl(lines(n_lines)))
        with pytest.raises(httpx2.TransportError):  # killed before it could say so
            gateway.http.post("/v1/batches", json={"input_file_id": file_id, "endpoint": CHAT})
    assert killed.wait() == signal.SIGKILL

    for order in AT_THE_BEGINNING:
        killed.start(order)
        assert killed.wait() == signal.SIGKILL
    rng = random.Random(5)
    for _ in range(n_kills):
        n_asked = len(engine.requests) + rng.randrange(1, 12)
        _, pid = killed.start(Order())
        until(lambda n=n_asked: len(engine.requests) >= n)
        os.kill(pid, signal.SIGKILL)
        assert killed.wait() == signal.SIGKILL
    n_left = n_lines - len({body["messages"][0]["content"][-1]["text"] for body in engine.requests})
    assert n_left > 0
    engine.seconds_per_piece = 0
    for order in AT_THE_END:
        killed.start(order)
        assert killed.wait() == signal.SIGKILL

    address, pid = killed.start(Order())
    gateway = RunningGateway(url=address, engine=engine)
    with gateway.http:
        until(gateway.is_ready)
        [batch] = BatchList.model_validate_json(gateway.http.get("/v1/batches").content).data
        batch = ended(gateway, batch.id)
        check_answers(gateway, batch, n_lines)
    os.kill(pid, signal.SIGKILL)
    killed.wait()
    kept = {path.name for path in (tmp_path / "batches").glob("*file-*")}
    assert kept == {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert list((tmp_path / "batches").glob(".part*")) == []
    # What was answered is not asked again: only what was in flight.
    n_servers = len(AT_THE_BEGINNING) + n_kills + len(AT_THE_END)
    assert len(engine.requests) <= n_lines + n_servers * N_CONCURRENT


def check_answers(gateway: RunningGateway, batch: Batch, n_lines: int) -> None:
    """Each line has its answer, once, in order."""
    assert batch.status == "completed"
    good = results(gateway, batch.output_file_id)
    bad = results(gateway, batch.error_file_id)
    expected = [f"{k}" for k in range(n_lines) if not is_refused(k)]
    assert [one.custom_id for one in good] == expected
    assert [one.custom_id for one in bad] == [f"{k}" for k in range(n_lines) if is_refused(k)]
    for one in good:
        assert one.response is not None
        said = one.response.body["choices"][0]["message"]["content"]
        assert said == f"answer {one.custom_id}"
    told = batch.request_counts
    assert (told.total, told.completed, told.failed) == (n_lines, len(good), len(bad))
    assert batch_of(gateway, batch.id) == batch
