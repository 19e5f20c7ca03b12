"""The caller of one request: whose it is, what its key allows, what it used.

Limits are token buckets: full at the start, filled again evenly over a minute. They belong to a
key, not to its tenant: two keys of one tenant have a bucket each. They are in the memory of this
process, or shared with other servers (`shared_limits`); what is known of those is kept here too, so
that this server can go on by itself.

Knows: limits, OpenAI's rate limit headers. Does not know: where keys come from, routes.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import Scope

from molmo_core.errors import RateLimited, TooManyMedia
from molmo_server.tenancy.shared_limits import SharedLimits, Taken
from molmo_server.tenancy.store import Key, Usage

_CALLER = "caller"
_SLOT_RETRY_S = 1.0
Headers = list[tuple[bytes, bytes]]


class Bucket:
    def __init__(self, per_min: int, clock_s: Callable[[], float]) -> None:
        self.per_min = per_min
        self._clock_s = clock_s
        self._left, self._seen_s = float(per_min), clock_s()

    def take(self, n: int, *, leaving: int = 0) -> float:
        """0 when `n` were taken and at least `leaving` are left; else nothing was, and it can be
        after so many seconds."""
        self._fill()
        if n + leaving <= self._left:
            self._left -= n
            return 0.0
        return self.wait_s(n + leaving)

    def wait_s(self, n: int) -> float:
        """Until `n` are there."""
        return (n - self._left) * 60 / self.per_min

    def set_left(self, left: float) -> None:
        """As others who take from it say."""
        self._left, self._seen_s = left, self._clock_s()

    def headers(self, what: str) -> Headers:
        """How many of `what` are allowed and left, and when all are there again."""
        self._fill()
        reset_s = (self.per_min - self._left) * 60 / self.per_min
        values = {
            "limit": f"{self.per_min}",
            "remaining": f"{math.floor(self._left)}",
            "reset": f"{reset_s:.3f}s",
        }
        return [(f"x-ratelimit-{k}-{what}".encode(), v.encode()) for k, v in values.items()]

    def _fill(self) -> None:
        now_s = self._clock_s()
        gained = (now_s - self._seen_s) * self.per_min / 60
        self._left, self._seen_s = min(self._left + gained, float(self.per_min)), now_s


class Allowance:
    """What a key may have at present."""

    def __init__(
        self,
        key: Key,
        *,
        shared: SharedLimits | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`shared`: where several servers count together; None: this one by itself."""
        self.key = key
        self._shared = shared
        self._n_running = 0
        per_min = {
            "requests": key.requests_per_min,
            "visual-tokens": key.visual_tokens_per_min,
        }
        self._buckets = {what: Bucket(n, clock_s) for what, n in per_min.items() if n is not None}

    @asynccontextmanager
    async def request(self, *, is_background: bool = False) -> AsyncIterator[None]:
        """One request, as long as the block runs; raises RateLimited.

        In the background it takes no place of those at the same time, and half of what the key may
        have a minute is left to those that are waited for.
        """
        if is_background:
            await self._take("requests", 1, is_background=True)
            yield
            return
        taken = await self._take("requests", 1, allowed=self.key.n_concurrent)
        self._n_running += 1
        try:
            yield
        finally:
            self._n_running -= 1
            if taken is not None and self._shared is not None:
                self._shared.leave(taken.lease)

    async def take_visual_tokens(self, n: int, *, is_background: bool = False) -> None:
        """Raises RateLimited; TooManyMedia for more than a whole minute's."""
        bucket = self._buckets.get("visual-tokens")
        if bucket is not None and n > bucket.per_min:
            raise TooManyMedia(
                f"the media are {n:,} visual tokens, this key may send {bucket.per_min:,} a "
                "minute; send fewer or smaller media, or use a key that allows more"
            )
        await self._take("visual-tokens", n, is_background=is_background)

    def headers(self) -> Headers:
        return [h for what, bucket in self._buckets.items() for h in bucket.headers(what)]

    async def _take(
        self, what: str, n: int, *, allowed: int | None = None, is_background: bool = False
    ) -> Taken | None:
        """Take from the bucket `what`, and a place among `allowed`, together with other servers or
        here. Returns what is to be given back to those. Raises RateLimited."""
        bucket = self._buckets.get(what)
        leaving = 0
        if bucket is not None and is_background:
            leaving = min(bucket.per_min // 2, bucket.per_min - n)
        taken = None
        if self._shared is not None and (bucket is not None or allowed is not None):
            per_min = bucket.per_min if bucket else None
            taken = await self._shared.take(
                self.key.prefix, what, n, per_min=per_min, leaving=leaving, allowed=allowed
            )
        n_running, wait_s = self._n_running, 0.0
        if taken is not None and allowed is not None:
            n_running = allowed if taken.lacks == "slot" else 0
        if allowed is not None and n_running >= allowed:
            raise RateLimited(
                f"{n_running} requests of this key are being answered, which is all it may "
                "have at the same time; send the next when one is done",
                retry_after_s=_SLOT_RETRY_S,
            )
        if bucket is None:
            return taken
        if taken is None:
            wait_s = bucket.take(n, leaving=leaving)
        else:
            bucket.set_left(taken.left)
            wait_s = bucket.wait_s(n + leaving) if taken.lacks else 0.0
        if wait_s > 0:
            raise RateLimited(
                f"too little is left of this key's {bucket.per_min:,} {what.replace('-', ' ')} a "
                f"minute, this request takes {n:,}; send it again in {math.ceil(wait_s)} s",
                retry_after_s=wait_s,
            )
        return taken


@dataclass(frozen=True, kw_only=True)
class Errand:
    """A request that the server sends itself, for a tenant who is not there."""

    tenant: str
    key_prefix: str
    """Of the key that asked for it; empty where no keys are asked for."""

    @classmethod
    def of(cls, caller: Caller) -> Errand:
        prefix = caller.allowance.key.prefix if caller.allowance else ""
        return cls(tenant=caller.tenant, key_prefix=prefix)


@dataclass(kw_only=True)
class Caller:
    """Without an allowance: anybody, where no keys are asked for."""

    allowance: Allowance | None = None
    errand: Errand | None = None
    """Nobody waits for the answer now: those who do go first."""
    usage: Usage = field(default_factory=lambda: Usage(requests=1))
    _has_paid: bool = False

    @property
    def tenant(self) -> str:
        return self.allowance.key.name if self.allowance else ""

    @property
    def is_counted(self) -> bool:
        return self.allowance is not None

    @property
    def is_background(self) -> bool:
        return self.errand is not None

    async def pay(self, n_visual_tokens: int) -> None:
        """Take a measured prompt from what the key may have; once, however often it is measured.

        Raises RateLimited, TooManyMedia.
        """
        if self.allowance is not None and n_visual_tokens > 0 and not self._has_paid:
            await self.allowance.take_visual_tokens(
                n_visual_tokens, is_background=self.is_background
            )
        self._has_paid = True

    def note_tokens(self, *, prompt: int, visual: int, completion: int) -> None:
        """Of one answer; several in a request add up, and are about the same media."""
        self.usage.prompt_tokens += prompt
        self.usage.visual_tokens = max(self.usage.visual_tokens, visual)
        self.usage.completion_tokens += completion

    def headers(self) -> Headers:
        return self.allowance.headers() if self.allowance else []

    def log_fields(self) -> dict[str, str]:
        if self.allowance is None:
            return {}
        return {"tenant": self.tenant, "key_prefix": self.allowance.key.prefix}


def set_caller(scope: Scope, caller: Caller) -> None:
    scope["state"][_CALLER] = caller


def caller_of(scope: Scope) -> Caller:
    """Whoever the check before the route found; anybody before it and where it asks for no key."""
    caller: Caller | None = scope["state"].get(_CALLER)
    if caller is None:
        caller = scope["state"][_CALLER] = Caller()
    return caller
