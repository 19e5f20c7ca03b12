"""Limits that two gateways count together, in a real Redis; and what each does without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from molmo_core.errors import RateLimited
from molmo_server.tenancy.callers import Allowance
from molmo_server.tenancy.shared_limits import SharedLimits
from molmo_server.tenancy.store import Key, KeyStore
from tests.support.gateway import error_of, running_gateway
from tests.support.services import running_redis


@pytest.fixture(scope="module")
def folder_of_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("redis")
    with running_redis(folder):
        yield folder


@pytest.fixture
async def url(folder_of_redis: Path) -> AsyncIterator[str]:
    """Of an empty Redis."""
    address = f"unix://{folder_of_redis / 'redis.sock'}"
    async with Redis.from_url(address) as redis:
        await redis.flushall()
    return address


def allowance(shared: SharedLimits, **limits: int) -> Allowance:
    key = Key(prefix="molmo-abcdef", digest=b"", name="a", scope="infer", created_s=0.0, **limits)
    return Allowance(key, shared=shared)


async def ask(allowed: Allowance) -> None:
    async with allowed.request():
        pass


async def test_a_minute_is_shared(url: str) -> None:
    one, other = SharedLimits(url), SharedLimits(url)
    async with one.running(), other.running():
        here = allowance(one, requests_per_min=3, visual_tokens_per_min=100)
        there = allowance(other, requests_per_min=3, visual_tokens_per_min=100)
        await ask(here)
        await ask(there)
        await ask(here)
        for refusing in (here, there):
            with pytest.raises(RateLimited, match="3 requests a minute") as refused:
                await ask(refusing)
            assert refused.value.retry_after_s is not None
            assert 15 < refused.value.retry_after_s <= 20
        await here.take_visual_tokens(60)
        with pytest.raises(RateLimited, match="this request takes 60"):
            await there.take_visual_tokens(60)
        await there.take_visual_tokens(40)
        told = dict(there.headers())
        assert told[b"x-ratelimit-remaining-requests"] == b"0"
        assert told[b"x-ratelimit-remaining-visual-tokens"] == b"0"


async def test_the_background_leaves_half_of_a_minute(url: str) -> None:
    one, other = SharedLimits(url), SharedLimits(url)
    async with one.running(), other.running():
        here = allowance(one, requests_per_min=4, visual_tokens_per_min=100, n_concurrent=1)
        there = allowance(other, requests_per_min=4, visual_tokens_per_min=100, n_concurrent=1)
        async with here.request(is_background=True), there.request(is_background=True):
            with pytest.raises(RateLimited, match="4 requests a minute"):
                async with here.request(is_background=True):
                    pass
            await ask(there)  # those of the background take no place
        await here.take_visual_tokens(50, is_background=True)
        with pytest.raises(RateLimited, match="this request takes 1;"):
            await there.take_visual_tokens(1, is_background=True)
        await there.take_visual_tokens(50)


async def test_no_more_is_given_than_there_is(url: str) -> None:
    """Two hundred at once, of two servers, take what a minute has and nothing more."""
    one, other = SharedLimits(url), SharedLimits(url)
    async with one.running(), other.running():
        allowed = [allowance(shared, requests_per_min=50) for shared in (one, other)]
        done = await asyncio.gather(
            *(ask(allowed[k % 2]) for k in range(200)), return_exceptions=True
        )
    assert sum(one is None for one in done) == 50
    assert sum(isinstance(one, RateLimited) for one in done) == 150


async def test_places_are_shared_and_given_back(url: str) -> None:
    one, other = SharedLimits(url), SharedLimits(url)
    async with one.running(), other.running():
        here, there = allowance(one, n_concurrent=2), allowance(other, n_concurrent=2)
        async with AsyncExitStack() as running:
            await running.enter_async_context(here.request())
            await running.enter_async_context(there.request())
            with pytest.raises(RateLimited, match="2 requests of this key are being answered"):
                await ask(here)
        async with asyncio.timeout(5):
            while True:
                try:
                    async with here.request(), there.request():
                        break
                except RateLimited:
                    await asyncio.sleep(0.01)


async def test_the_places_of_a_server_that_died_run_out(url: str) -> None:
    alive = SharedLimits(url, lease_s=0.6, renew_s=0.1)
    dying = SharedLimits(url, lease_s=0.6, renew_s=60)
    async with alive.running(), dying.running():
        lost = allowance(dying, n_concurrent=2).request()
        await lost.__aenter__()
        async with allowance(alive, n_concurrent=2).request():
            third = allowance(alive, n_concurrent=2)
            with pytest.raises(RateLimited):
                await ask(third)
            async with asyncio.timeout(5):
                while True:
                    try:
                        await ask(third)
                        break
                    except RateLimited:
                        await asyncio.sleep(0.05)
            await asyncio.sleep(0)
            async with third.request():
                with pytest.raises(RateLimited):  # the first one's is renewed
                    await ask(third)
        await lost.__aexit__(None, None, None)


async def test_without_redis_each_counts_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molmo_server.tenancy.shared_limits._PAUSE_S", 0.05)
    caplog.set_level(logging.WARNING)
    shared = SharedLimits(f"unix://{tmp_path}/redis.sock")
    async with shared.running():
        allowed = allowance(shared, requests_per_min=4, n_concurrent=1)
        with running_redis(tmp_path):
            await ask(allowed)
        await ask(allowed)
        await ask(allowed)
        async with allowed.request():
            with pytest.raises(RateLimited, match="1 requests of this key"):
                await ask(allowed)
        with pytest.raises(RateLimited, match="4 requests a minute"):
            await ask(allowed)
        with running_redis(tmp_path):  # it has forgotten everything
            async with asyncio.timeout(5):
                while "limits are shared again" not in caplog.text:
                    with suppress(RateLimited):
                        await ask(allowed)
                    await asyncio.sleep(0.02)
    assert caplog.text.count("limits are counted by this server alone") == 1


async def test_a_password_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    shared = SharedLimits("redis://acme:a-secret@127.0.0.1:9/0")
    async with shared.running():
        await ask(allowance(shared, requests_per_min=1))
    assert "redis://acme:***@127.0.0.1:9/0 does not answer" in caplog.text
    assert "a-secret" not in caplog.text


def test_two_gateways(url: str, folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.db"
    store = KeyStore(keys)
    key = store.create("acme", requests_per_min=2)
    store.close()
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    fields = {"keys": keys, "limits": url}
    with (
        running_gateway(folder, tmp_path / "one", **fields) as one,
        running_gateway(folder, tmp_path / "other", **fields) as other,
    ):
        statuses = []
        for gateway in (one, other, one, other):
            gateway.http.headers["authorization"] = f"Bearer {key}"
            answer = gateway.chat("Hi")
            statuses.append(answer.status_code)
        assert statuses == [200, 200, 429, 429]
        assert error_of(answer)["code"] == "rate_limit_exceeded"
