"""The real engine is killed or stopped at random moments, under callers and a batch.

Nobody hangs, no line of a batch is lost, and whatever is answered is what an undisturbed server
answers. Model: molmo2-tiny with one thread. Prints how long it took until answers came again.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_client import Client
from molmo_core.api_batches import Batch
from molmo_server.engine_pool import SupervisedEngine
from molmo_server.settings import MolmoSettings
from tests.e2e.test_engine_killed import DEADLINE_S, START_LIMIT_S, VICTIMS, Load, streamed, whole
from tests.server.batches import POINT, jsonl, line
from tests.server.media import data_url, picture
from tests.support.gateway import serve_own_engines, until

N_LINES = 30
WHOLE_GROUP = "whole group"
_AGAIN_SHARE = 0.2
"""Of the cycles, in which the engine is struck once more while it starts."""
_COLOURS = ("red", "blue", "green", "white", "black")


def requests() -> list[dict[str, Any]]:
    """Lines of a batch; the question is told by the first letters of `custom_id`."""
    return [
        line(
            f"{k % len(_COLOURS)}-{k}",
            url=POINT,
            body={
                "object": f"the {_COLOURS[k % len(_COLOURS)]} circle",
                "image_url": data_url(picture(80, 60)),
                "max_tokens": 40,
            },
        )
        for k in range(N_LINES)
    ]


@dataclass
class Batches:
    """One batch after the other, each looked at when it has ended."""

    url: str
    file: Path
    expected: dict[str, str] = field(default_factory=dict)
    """Text by question; the first batch, which nothing disturbs, tells."""
    n_lines: int = 0
    failures: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._go_on)
        thread.start()
        try:
            yield
        finally:
            self.is_over.set()
            thread.join(timeout=START_LIMIT_S)
            assert not thread.is_alive(), "a batch hangs"

    def _go_on(self) -> None:
        while not self.is_over.is_set():
            self.run_one()

    def run_one(self) -> None:
        with Client(self.url) as client:
            batch = client.batches.submit(self.file, POINT)
            self._check(client, client.batches.wait(batch.id))

    def _check(self, client: Client, batch: Batch) -> None:
        results = list(client.batches.results(batch))
        wanted = [one["custom_id"] for one in requests()]
        got = [one.custom_id for one in results]
        if (batch.status, got) != ("completed", wanted) or batch.request_counts.failed:
            self.failures.append(f"{batch.status}: {[(r.custom_id, r.response) for r in results]}")
            return
        for one in results:
            assert one.response is not None
            text = one.response.body["text"]
            if self.expected.setdefault(one.custom_id[:1], text) != text:
                self.failures.append(f"{one.custom_id}: {text}")
        self.n_lines += len(results)


@dataclass
class Strikes:
    engine: SupervisedEngine
    rng: random.Random
    done: list[str] = field(default_factory=list)

    def strike(self, *numbers: signal.Signals) -> None:
        """Send one of the signals to the engine, or one of its processes, if there is one now."""
        number = self.rng.choice(numbers)
        victim = self.rng.choice((*VICTIMS, WHOLE_GROUP))
        group = self.engine.pid
        if group is None:
            return
        with suppress(ProcessLookupError):
            if victim == WHOLE_GROUP:
                os.killpg(group, number)
            else:
                for pid in processes(group, victim):
                    os.kill(pid, number)
            self.done.append(f"{number.name} {victim}")


def processes(group: int, name: str) -> list[int]:
    """Of a process group, those whose command line has `name`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if os.getpgid(int(folder.name)) == group and name in words and "watchdog" not in words:
                found.append(int(folder.name))
    return found


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, SupervisedEngine]]:
    settings = MolmoSettings(
        batch_dir=folder / "batches",
        dtype="float32",
        n_threads=1,
        deadline_s=DEADLINE_S,
        start_timeout_s=START_LIMIT_S,
        hang_grace_s=10,
        first_backoff_s=0.1,
        longest_backoff_s=1,
        drain_s=5,
    )
    with serve_own_engines(settings, folder) as (url, pool):
        [engine] = pool.engines
        assert isinstance(engine, SupervisedEngine)
        yield url, engine


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("n_cycles", [5, 60])
def test_killed_and_stopped(n_cycles: int, tmp_path: Path, show: Callable[..., None]) -> None:
    (tmp_path / "requests.jsonl").write_bytes(jsonl(requests()))
    rng, recovered_s = random.Random(n_cycles), []
    with (
        serving(tmp_path) as (url, engine),
        httpx2.Client(base_url=url, timeout=DEADLINE_S) as http,
    ):
        expected = {whole(http).text, streamed(http).text}
        batches, load = Batches(url, tmp_path / "requests.jsonl"), Load(url)
        batches.run_one()
        strikes = Strikes(engine, rng)
        with load.running(), batches.running():
            for _ in range(n_cycles):
                time.sleep(rng.uniform(0, 6))
                recovered_s.append(strike_and_wait(strikes, load))
        figures = http.get("/metrics").text
    assert load.outcomes
    for outcome in load.outcomes:
        if outcome.error_code is None:
            assert outcome.text in expected
        else:
            assert outcome.error_code in {"engine_unavailable", "engine_failed", "busy"}
            assert outcome.took_s < DEADLINE_S + 30
    assert batches.failures == []
    assert f'molmo_batch_lines_total{{status="completed"}} {batches.n_lines:.1f}' in figures
    show(*report(recovered_s, strikes, load, batches))


def strike_and_wait(strikes: Strikes, load: Load) -> float:
    """Seconds from the last strike until answers come again."""
    engine, rng = strikes.engine, strikes.rng
    n_restarts = engine.n_restarts
    struck = time.monotonic()
    strikes.strike(signal.SIGKILL, signal.SIGSTOP)
    until(lambda: engine.n_restarts > n_restarts, START_LIMIT_S)
    if rng.random() < _AGAIN_SHARE:
        time.sleep(rng.uniform(0, 15))
        struck = time.monotonic()
        strikes.strike(signal.SIGKILL)  # one that is stopped now has the time of a start
    n_good = load.n_good()
    until(lambda: engine.ready.is_set() and load.n_good() > n_good, START_LIMIT_S)
    return time.monotonic() - struck


def report(
    recovered_s: list[float], strikes: Strikes, load: Load, batches: Batches
) -> tuple[str, ...]:
    failed = Counter(o.error_code for o in load.outcomes if o.error_code is not None)
    return (
        f"{len(recovered_s)} cycles, strikes {dict(Counter(strikes.done))}",
        f"until answers came again: median {statistics.median(recovered_s):.1f} s, "
        f"worst {max(recovered_s):.1f} s",
        f"callers: {load.n_good()} answered, told of failures {dict(failed)}, 0 wrong, 0 hung",
        f"batches: {batches.n_lines} lines answered once, 0 lost, 0 wrong",
    )
