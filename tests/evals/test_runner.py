"""Asking all samples: what is logged, what is asked again, what stops a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_client import AsyncClient, RetryPolicy, ServerUnreachable
from molmo_core.errors import InvalidRequest
from molmo_evals.log import Entry, RunIdentity, RunLog
from molmo_evals.runner import run_task
from molmo_evals.task import Group, Sample, Score, Task

IDENTITY = RunIdentity(task="toy", seed=1, checkpoint="c@1", version="0")
ANSWER = {
    "request_id": "r",
    "checkpoint": "c@1",
    "text": "A",
    "finish_reason": "stop",
    "media": [],
    "frames": [],
    "warnings": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    "caption": "A",
}
PNG = b"\x89PNG\r\n\x1a\n"


def toy_samples(seed: int, n: int) -> Iterator[Sample]:
    for index in range(n):
        yield Sample(
            key=f"toy/{index}",
            group="toy",
            verb="caption",
            text="",
            media=lambda index=index: [PNG + bytes([index])],
            score=lambda answer: Score(numbers={"value": float(answer.caption == "A")}),
            failed=Score(numbers={"value": 0.0}),
        )


TOY = Task(
    name="toy",
    what="",
    groups=(Group(name="toy", metric="accuracy", what=""),),
    samples=toy_samples,
)


class Server:
    """Answers like a gateway without a socket; `refuse` decides which requests fail."""

    def __init__(
        self,
        refuse: Callable[[int], httpx2.Response | None] = lambda n: None,
        *,
        together: asyncio.Barrier | None = None,
    ) -> None:
        self.n_requests = self.n_running = self.most_running = 0
        self._refuse = refuse
        self._together = together

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.n_requests += 1
        self.n_running += 1
        self.most_running = max(self.most_running, self.n_running)
        refusal = self._refuse(self.n_requests)
        if self._together is not None:
            await self._together.wait()
        self.n_running -= 1
        return refusal or httpx2.Response(200, json=ANSWER)


async def run(server: Server, log: Path, n: int = 6, **options: Any) -> list[Entry]:
    transport = httpx2.MockTransport(server)
    retries = RetryPolicy(n_retries=0)
    async with AsyncClient("http://toy", transport=transport, retries=retries) as client:
        return await run_task(TOY, client, IDENTITY, n=n, log=log, **options)


async def test_every_sample_is_asked_and_logged(tmp_path: Path) -> None:
    server, log, done = Server(), tmp_path / "deep" / "run.jsonl", []
    entries = await run(server, log, on_done=done.append)
    assert [entry.key for entry in entries] == [f"toy/{index}" for index in range(6)]
    assert {entry.numbers["value"] for entry in entries} == {1.0}
    first, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert first == asdict(IDENTITY)
    assert sorted(line["key"] for line in lines) == [entry.key for entry in entries]
    assert lines[0]["text"] == "A"
    assert len(done) == 6


async def test_no_more_requests_at_a_time_than_asked(tmp_path: Path) -> None:
    three = asyncio.Barrier(3)  # fewer than three at a time would wait for ever
    server = Server(together=three)
    async with asyncio.timeout(60):
        await run(server, tmp_path / "run.jsonl", n=30, n_at_once=3)
    assert (server.n_requests, server.most_running) == (30, 3)


async def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    await run(Server(), log, n=4)
    with log.open("a") as file:
        file.write('{"key": "toy/4", "gro')  # the machine went down while writing
    server = Server()
    entries = await run(server, log, n=6)
    assert server.n_requests == 2
    assert len(entries) == 6
    again = Server()
    assert await run(again, log, n=6) == entries
    assert again.n_requests == 0


async def test_a_failed_sample_scores_nothing_and_is_asked_again(tmp_path: Path) -> None:
    log, refusal = tmp_path / "run.jsonl", {"error": {"message": "no", "type": "t"}}
    broken = Server(lambda n: httpx2.Response(400, json=refusal) if n == 2 else None)
    entries = await run(broken, log, n_at_once=1)
    assert [entry.error is not None for entry in entries] == [False, True] + [False] * 4
    assert entries[1].numbers == {"value": 0.0}
    healed = Server()
    entries = await run(healed, log)
    assert healed.n_requests == 1
    assert all(entry.error is None for entry in entries)


async def test_a_server_that_goes_away_stops_the_run(tmp_path: Path) -> None:
    def gone(n: int) -> None:
        if n > 3:
            raise httpx2.ConnectError("gone")

    log = tmp_path / "run.jsonl"
    with pytest.raises(ServerUnreachable, match="molmo serve"):
        await run(Server(gone), log, n_at_once=2)
    server = Server()
    assert len(await run(server, log)) == 6
    assert server.n_requests == 3


def test_a_log_of_another_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with RunLog(path, IDENTITY):
        pass
    before = path.read_bytes()
    other = RunIdentity(task="toy", seed=1, checkpoint="c@2", version="0")
    with pytest.raises(InvalidRequest, match=r"c@1.*this run is.*c@2.*--folder"):
        RunLog(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("second_line", "message"), [("nonsense", "is no log"), ('{"key": 1}', "another version")]
)
def test_a_file_that_is_no_log_is_left_alone(
    tmp_path: Path, second_line: str, message: str
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"{json.dumps(asdict(IDENTITY))}\n{second_line}\n")
    before = path.read_bytes()
    with pytest.raises(InvalidRequest, match=message):
        RunLog(path, IDENTITY)
    assert path.read_bytes() == before
