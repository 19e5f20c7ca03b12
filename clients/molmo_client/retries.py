"""When a request is sent again, and after how long.

Knows: which answers and failures are worth another try. Does not know: how requests are sent or
slept between. Numbers are those of the official OpenAI client.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import httpx2

from molmo_client.failures import retry_after_s

_RETRIED_STATUSES = frozenset({408, 409, 429})


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """`n_retries` tries after the first, `first_delay_s` doubling up to `longest_delay_s`.

    A `Retry-After` of up to `longest_obeyed_s` is obeyed as it is; a longer one ends the tries.
    """

    n_retries: int = 2
    first_delay_s: float = 0.5
    longest_delay_s: float = 8.0
    longest_obeyed_s: float = 120.0

    def delay_s(
        self, n_tries: int, outcome: httpx2.Response | httpx2.TransportError, *, jitter: float
    ) -> float | None:
        """Seconds to wait before the next try after `n_tries` of them; None to give up.

        `jitter` in 0-1 takes up to a quarter off the wait.
        """
        if n_tries > self.n_retries or not is_worth_retrying(outcome):
            return None
        headers: Mapping[str, str] = outcome.headers if isinstance(outcome, httpx2.Response) else {}
        asked_s = retry_after_s(headers)
        if asked_s is not None:
            return asked_s if asked_s <= self.longest_obeyed_s else None
        delay_s = min(self.first_delay_s * 2.0 ** (n_tries - 1), self.longest_delay_s)
        return float(delay_s * (1 - 0.25 * jitter))


def is_worth_retrying(outcome: httpx2.Response | httpx2.TransportError) -> bool:
    """A lost connection is; an answer that never came is not: the server may still work on it."""
    if isinstance(outcome, httpx2.Response):
        told = outcome.headers.get("x-should-retry")
        if told in ("true", "false"):
            return told == "true"
        return outcome.status_code in _RETRIED_STATUSES or outcome.status_code >= 500
    if isinstance(outcome, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return False
    return not isinstance(outcome, httpx2.ReadTimeout | httpx2.WriteTimeout)


def random_jitter() -> float:
    return random.random()
