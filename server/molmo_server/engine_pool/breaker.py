"""How far an engine that breaks on requests is still trusted with more.

Failures in a row open the breaker for a time that doubles with each further one; afterwards it is
half open: one request at a time, until one was answered. What a caller did wrong is no failure.

Knows: counts and time. Does not know: engines, what a failure was, who is asked instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

_MAX_FAILURES = 3
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


class Trust(StrEnum):
    CLOSED = "closed"  # asked as any other
    OPEN = "open"  # left alone
    HALF_OPEN = "half_open"  # asked one at a time


class Breaker:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._n_failures = 0
        self._open_until = 0.0

    def fail(self) -> None:
        """A request broke on the engine, or was kept waiting until its deadline."""
        self._n_failures += 1
        doublings = min(self._n_failures - _MAX_FAILURES, 10)
        if doublings >= 0:
            pause_s = min(_FIRST_PAUSE_S * 2.0**doublings, _LONGEST_PAUSE_S)
            self._open_until = self._clock() + pause_s

    def succeed(self) -> None:
        """A request was answered to its end."""
        self._n_failures = 0

    @property
    def trust(self) -> Trust:
        if self._n_failures < _MAX_FAILURES:
            return Trust.CLOSED
        return Trust.OPEN if self._clock() < self._open_until else Trust.HALF_OPEN
