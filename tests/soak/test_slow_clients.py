"""What five hundred slow sockets cost everybody else: calms and storms in turn, with figures.

Who asks well does so from a process of its own: else it would wait for those that drip.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.server import test_slow_clients as slow_clients
from tests.server.test_slow_clients import LATE_S, SETTLED_S, Server, calm, p99, slow_ones

N_ROUNDS = 10
LENGTH_S = 2.0

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

server = slow_clients.server


def test_good_requests_in_calm_and_storm(server: Server, show: Callable[..., None]) -> None:
    quiet: list[float] = []
    stormy: list[float] = []
    late_s: list[float] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as others:
        for _ in range(N_ROUNDS):
            quiet += others.submit(good_requests, server, 0).result()
            good = others.submit(good_requests, server, SETTLED_S)
            late_s += asyncio.run(slow_ones(server))
            stormy += good.result()

    for name, took_s in (("calm", quiet), ("storm", stormy)):
        show(
            f"{name}: {len(took_s)} good requests, p50 {statistics.median(took_s) * 1e3:.1f} "
            f"ms, p99 {p99(took_s) * 1e3:.1f} ms, worst {max(took_s) * 1e3:.0f} ms"
        )
    show(f"{len(late_s)} slow sockets cut, at most {max(late_s):.2f} s late")
    assert max(late_s) < LATE_S
    assert len(stormy) > 10 * N_ROUNDS
    assert statistics.median(stormy) < slow_clients.FACTOR * max(statistics.median(quiet), 0.002)
    assert p99(stormy) < slow_clients.FACTOR * max(p99(quiet), 0.1)


def good_requests(server: Server, after_s: float) -> list[float]:
    """Seconds of each."""

    async def asked() -> list[float]:
        await asyncio.sleep(after_s)
        return await calm(server, length_s=LENGTH_S)

    return asyncio.run(asked())
