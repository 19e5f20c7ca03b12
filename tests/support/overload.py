"""More requests than a gateway can serve, from three keys of which one floods, at their own pace.

The engine takes a fixed time for each request and any number at once, so capacity is what the
gateway admits: `N_AT_WORK / SERVICE_S` requests a second.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from molmo_server.engine_pool.fake import DEFAULT_ANSWER, FakeEngine
from molmo_server.tenancy.store import KeyStore
from tests.support.gateway import RunningGateway, running_gateway

N_AT_WORK = 4
SERVICE_S = 0.2
SHARES = {"flood": 3.0, "second": 1.0, "third": 1.0}
"""What each key asks for, in capacities: five together, and each more than a third of one."""
_BODY = {"messages": [{"role": "user", "content": "Hi"}]}
_PIECES = -(-len(DEFAULT_ANSWER) // 4)


@dataclass(frozen=True, kw_only=True)
class Call:
    tenant: str
    status: int
    began_s: float
    took_s: float


@dataclass(frozen=True, kw_only=True)
class Overload:
    """What came of it; only what was answered within the time counts as served."""

    capacity_per_s: float
    duration_s: float
    calls: list[Call]
    keys: tuple[str, ...]

    @property
    def served(self) -> Counter[str]:
        return Counter(
            call.tenant
            for call in self.calls
            if call.status == 200 and call.began_s + call.took_s <= self.duration_s
        )

    @property
    def goodput(self) -> float:
        """As part of the capacity."""
        return sum(self.served.values()) / self.duration_s / self.capacity_per_s

    @property
    def fairness(self) -> float:
        """Jain's index of what each key got: 1 when all are equal, a third when one has all."""
        got = [self.served[tenant] for tenant in self.keys]
        return sum(got) ** 2 / (len(got) * sum(n * n for n in got))

    def refused_s(self) -> list[float]:
        """How long refused callers waited for the refusal, shortest first."""
        return sorted(call.took_s for call in self.calls if call.status != 200)

    def report(self) -> str:
        refused = self.refused_s()
        statuses = dict(Counter(call.status for call in self.calls))
        return (
            f"capacity {self.capacity_per_s:.1f}/s, asked {len(self.calls) / self.duration_s:.1f}/s"
            f" for {self.duration_s:g} s: {statuses}; goodput {self.goodput:.3f} of capacity, "
            f"served {dict(self.served)}, fairness {self.fairness:.4f}; refused after "
            f"median {refused[len(refused) // 2] * 1e3:.1f} ms, "
            f"95 % {refused[len(refused) * 95 // 100] * 1e3:.1f} ms, "
            f"99 % {refused[len(refused) * 99 // 100] * 1e3:.1f} ms, "
            f"worst {refused[-1] * 1e3:.1f} ms"
        )


@contextmanager
def limited_gateway(folder: Path, scratch: Path) -> Iterator[tuple[RunningGateway, dict[str, str]]]:
    """A gateway and a key for each tenant."""
    store = KeyStore(scratch / "keys.db")
    keys = {name: store.create(name) for name in SHARES}
    store.close()
    engine = FakeEngine(seconds_per_piece=SERVICE_S / _PIECES)
    limits = {"max_concurrent": N_AT_WORK, "max_queued": 16, "keys": scratch / "keys.db"}
    with running_gateway(folder, scratch, engine, **limits) as gateway:
        yield gateway, keys


async def overload(
    url: str, keys: dict[str, str], *, alone_s: float, duration_s: float
) -> Overload:
    """Measure the capacity with one caller for each place, then ask for five times as much."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as http:
        capacity_per_s = await _capacity(http, keys["flood"], alone_s)
        began = time.monotonic()
        floods = [
            _arrivals(http, name, key, SHARES[name] * capacity_per_s, began, duration_s)
            for name, key in keys.items()
        ]
        calls = [call for one in await asyncio.gather(*floods) for call in one]
    return Overload(
        capacity_per_s=capacity_per_s, duration_s=duration_s, calls=calls, keys=tuple(keys)
    )


async def _capacity(http: aiohttp.ClientSession, key: str, duration_s: float) -> float:
    began = time.monotonic()
    n_served = 0

    async def caller() -> None:
        nonlocal n_served
        while time.monotonic() - began < duration_s:
            assert (await _ask(http, "", key, began)).status == 200
            n_served += 1

    await asyncio.gather(*(caller() for _ in range(N_AT_WORK)))
    return n_served / (time.monotonic() - began)


async def _arrivals(
    http: aiohttp.ClientSession,
    tenant: str,
    key: str,
    per_s: float,
    began: float,
    duration_s: float,
) -> list[Call]:
    """Requests at random moments, whatever became of those before."""
    rng = random.Random(tenant)
    asking = []
    at_s = rng.expovariate(per_s)
    while at_s < duration_s:
        await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
        asking.append(asyncio.create_task(_ask(http, tenant, key, began)))
        at_s += rng.expovariate(per_s)
    return await asyncio.gather(*asking)


async def _ask(http: aiohttp.ClientSession, tenant: str, key: str, origin: float) -> Call:
    began = time.monotonic()
    headers = {"authorization": f"Bearer {key}"}
    async with http.post("/v1/chat/completions", json=_BODY, headers=headers) as response:
        await response.read()
    return Call(
        tenant=tenant,
        status=response.status,
        began_s=began - origin,
        took_s=time.monotonic() - began,
    )
