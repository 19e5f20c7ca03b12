"""Two real engines under load: weights changed under both, one killed; nobody is refused, nothing
is mixed. Prints what callers noticed.

Answers in one piece only: of those nothing has been sent when an engine is lost.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from molmo_server.engine_pool import SupervisedEngine
from molmo_server.settings import MolmoSettings
from tests.soak.test_swaps import (
    KEY,
    PROMPTS,
    START_LIMIT_S,
    Answer,
    Published,
    answers_of_one,
    ask,
    published,
)
from tests.support.gateway import serve_own_engines, until

__all__ = ["published"]

N_SWAPS, N_CALLERS = 10, 4


def keep_asking(url: str, seed: int, answers: list[Answer], is_over: threading.Event) -> None:
    rng = random.Random(seed)
    with httpx2.Client(base_url=url, timeout=120) as http:
        while not is_over.is_set():
            answers.append(ask(http, rng.choice(PROMPTS), is_stream=False))


def activate(http: httpx2.Client, checkpoint_id: str) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    headers = {"authorization": f"Bearer {KEY}"}
    response = http.post(f"/admin/checkpoints/{checkpoint_id}/activate", headers=headers)
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def kill_and_wait(engine: SupervisedEngine) -> float:
    """The seconds until it was back."""
    pid, began = engine.pid, time.monotonic()
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    until(lambda: engine.pid not in (None, pid) and engine.ready.is_set(), START_LIMIT_S)
    return time.monotonic() - began


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_engines_under_load(
    published: Published,
    tmp_path: Path,
    show: Callable[..., None],
) -> None:
    first, second = published.ids
    published.store.set_current(first)
    settings = MolmoSettings(
        store=str(published.store.folder),
        cache_dir=tmp_path / "cache",
        admin_key=KEY,
        follows_store=False,
        dtype="float32",
        n_engines=2,
        n_threads=1,
        max_concurrent=N_CALLERS + 1,
        start_timeout_s=START_LIMIT_S,
        probe_tolerance=1e-3,
        max_model_len=2048,
    )
    answers: list[Answer] = []
    with (
        serve_own_engines(settings, tmp_path) as (url, pool),
        httpx2.Client(base_url=url, timeout=START_LIMIT_S) as http,
    ):
        until(lambda: all(engine.ready.is_set() for engine in pool.engines), START_LIMIT_S)
        expected = {first: answers_of_one(url)}
        activate(http, second)
        expected[second] = answers_of_one(url)
        is_over = threading.Event()
        callers = [
            threading.Thread(target=keep_asking, args=(url, k, answers, is_over))
            for k in range(N_CALLERS)
        ]
        for caller in callers:
            caller.start()
        swaps_s = [activate(http, (first, second)[k % 2]) for k in range(N_SWAPS)]
        killed = pool.engines[0]
        assert isinstance(killed, SupervisedEngine)
        back_s = kill_and_wait(killed)
        assert all(caller.is_alive() for caller in callers), "a caller was refused"
        is_over.set()
        for caller in callers:
            caller.join(timeout=120)
    assert {answer.checkpoint for answer in answers} == {first, second}
    for answer in answers:
        assert answer.text == expected[answer.checkpoint][answer.prompt]
    by_id = Counter(answer.checkpoint for answer in answers)
    took_s = [answer.took_s for answer in answers]
    show(
        f"{N_SWAPS} changes of both engines, one killed and back after {back_s:.1f} s; "
        f"{dict(by_id)} answers, none refused or mixed",
        f"a change: median {statistics.median(swaps_s):.2f} s, worst {max(swaps_s):.2f} s",
        f"an answer: median {statistics.median(took_s):.2f} s, worst {max(took_s):.2f} s",
    )
