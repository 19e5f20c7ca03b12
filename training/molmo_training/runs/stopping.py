"""When a run is asked to end: by signals or by its time.

The first SIGTERM or SIGINT only makes a note, on which all ranks agree at the next step, so that
they save the same step and end with code 0. A second one ends the process at once, with code 143
or 130. Several within a second are one: launchers pass on what the terminal has sent already.

Knows: signals, clocks, ranks. Does not know: what is done before the end.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from molmo_training.runs.ranks import Ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_S = 1.0


class Stopping:
    """Watches for requests to end while it is entered; every rank makes one.

    The handlers that were there come back on leaving. Only the main thread may enter it.
    """

    def __init__(
        self,
        *,
        time_limit_s: float | None = None,
        one_request_s: float = ONE_REQUEST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks = Ranks()
        self._one_request_s, self._clock = one_request_s, clock
        self._ends_s = None if time_limit_s is None else clock() + time_limit_s
        self._time_limit_s = time_limit_s
        self._signal: signal.Signals | None = None
        self._signalled_s = 0.0
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Why this process wants the run to end; other ranks may have other reasons."""
        if self._signal is not None:
            return self._signal.name
        if self._ends_s is not None and self._clock() >= self._ends_s:
            return f"the time limit of {self._time_limit_s:g} s"
        return None

    def agreed(self) -> bool:
        """Whether any rank wants to end. All ranks ask after the same step and hear the same."""
        reason = self.reason
        is_wanted = self._ranks.any(reason is not None)
        if is_wanted:
            logger.info("the run ends after this step: %s", reason or "another rank was asked to")
        return is_wanted

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child, of which the run's process takes care
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now_s = self._clock()
        if self._signal is None:
            self._signal, self._signalled_s = signal.Signals(number), now_s
        elif now_s - self._signalled_s >= self._one_request_s:
            os._exit(128 + number)
