"""Limits of keys counted in Redis, for several gateways together.

A request takes its place among those of its key and its share of the minute in one atomic script,
by Redis' own clock. Its place is a lease that is renewed while it runs: those of a gateway that
died run out. While Redis is away, or slow, this server counts by itself (`callers`), says so in its
log, and tries again after a pause.

Knows: Redis, buckets and leases. Does not know: keys, headers, errors of callers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molmo_server.tenancy.databases import without_password

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

_ANSWER_S = 0.5
"""Longer than this no request waits for Redis."""
_PAUSE_S = 2.0
"""So long after a failure Redis is left alone."""
_LEASE_S = 30.0
_RENEW_S = 10.0

# KEYS: bucket, leases. ARGV: amount, per minute (0: no bucket), allowed at the same time (0: any
# number), lease, seconds that a lease lasts, how much must be left in the bucket. Returns what
# there is too little of ("slot", "bucket"; "" when it was taken) and what is left in the bucket.
_TAKE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local amount, per_min, allowed = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if allowed > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('ZCARD', KEYS[2]) >= allowed then return {'slot', ''} end
end
local left = per_min
if per_min > 0 then
  local known = redis.call('HMGET', KEYS[1], 'left', 'seen')
  if known[1] then
    left = math.min(per_min, known[1] + math.max(0, now - known[2]) * per_min / 60)
  end
  local is_enough = amount + ARGV[6] <= left
  if is_enough then left = left - amount end
  redis.call('HSET', KEYS[1], 'left', tostring(left), 'seen', tostring(now))
  redis.call('EXPIRE', KEYS[1], 120)
  if not is_enough then return {'bucket', tostring(left)} end
end
if allowed > 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[5], ARGV[4])
  redis.call('EXPIRE', KEYS[2], math.ceil(ARGV[5] * 2))
end
return {'', tostring(left)}
"""
# KEYS: leases. ARGV: seconds that a lease lasts, leases. One that ran out meanwhile comes back: its
# request is still being answered.
_RENEW = """
local clock = redis.call('TIME')
local till = clock[1] + clock[2] / 1e6 + ARGV[1]
for k = 2, #ARGV do redis.call('ZADD', KEYS[1], till, ARGV[k]) end
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[1] * 2))
return redis.status_reply('OK')
"""


@dataclass(frozen=True, kw_only=True)
class Taken:
    lacks: str = ""
    """What there is too little of, "slot" or "bucket"; empty when it was taken."""
    left: float = math.inf
    """In the bucket, afterwards."""
    lease: str = ""


class SharedLimits:
    """Use inside `running`."""

    def __init__(self, url: str, *, lease_s: float = _LEASE_S, renew_s: float = _RENEW_S) -> None:
        self._url = url
        self._shown = without_password(url)
        self._lease_s, self._renew_s = lease_s, renew_s
        self._redis: Redis | None = None
        self._held: dict[str, str] = {}
        """Lease → the name of the leases that it is among."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._rest_until_s = 0.0
        self._is_away = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connect at the first use; keep leases as long as the block runs."""
        from redis.asyncio import Redis  # not needed without shared limits
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._redis = Redis.from_url(
            self._url,
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 1),  # for a connection that was closed meanwhile
        )
        renewing = asyncio.create_task(self._renew(), name="leases")
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, *self._leaving, return_exceptions=True)
            await self._redis.aclose()

    async def take(
        self,
        name: str,
        what: str,
        amount: int,
        *,
        per_min: int | None,
        leaving: int = 0,
        allowed: int | None = None,
    ) -> Taken | None:
        """Take from the bucket `what` of the key `name`, and a lease where `allowed` is given.

        `leaving`: nothing is taken where less than this would be left.

        None while Redis is away.
        """
        lease = uuid.uuid4().hex if allowed else ""
        # In a cluster both have to be on one server: the part in braces decides.
        leases = f"molmo:{{{name}}}:leases"
        found = await self._asked(
            _TAKE,
            [f"molmo:{{{name}}}:{what}", leases],
            [amount, per_min or 0, allowed or 0, lease, self._lease_s, leaving],
        )
        if found is None:
            return None
        lacks, left = (value.decode() for value in found)
        if lease and not lacks:
            self._held[lease] = leases
        return Taken(lacks=lacks, left=float(left or math.inf), lease=lease)

    def leave(self, lease: str) -> None:
        """End a lease; nobody waits for that."""
        leases = self._held.pop(lease, None)
        if leases is not None:
            task = asyncio.create_task(self._left(leases, lease))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _left(self, leases: str, lease: str) -> None:
        script = "return redis.call('ZREM', KEYS[1], ARGV[1])"
        await self._asked(script, [leases], [lease])

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            by_name: dict[str, list[str]] = {}
            for lease, leases in self._held.items():
                by_name.setdefault(leases, []).append(lease)
            for leases, held in by_name.items():
                await self._asked(_RENEW, [leases], [self._lease_s, *held])

    async def _asked(self, script: str, keys: list[str], values: list[Any]) -> Any:
        """What a script returns; None while Redis is away."""
        from redis.exceptions import RedisError

        assert self._redis is not None, "use it inside `running`"
        clock_s = asyncio.get_running_loop().time()
        if clock_s < self._rest_until_s:
            return None
        try:
            async with asyncio.timeout(_ANSWER_S):
                found = await self._redis.eval(script, len(keys), *keys, *values)
        except (RedisError, OSError, TimeoutError) as error:
            self._rest_until_s = clock_s + _PAUSE_S
            if not self._is_away:
                logger.error(
                    "limits are counted by this server alone, %s does not answer: %s",
                    self._shown,
                    type(error).__name__,
                )
            self._is_away = True
            return None
        if self._is_away:
            logger.warning("limits are shared again, %s answers", self._shown)
        self._is_away = False
        return found
