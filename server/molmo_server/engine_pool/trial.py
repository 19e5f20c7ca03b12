"""An engine on trial beside those that serve: whom it answers, and what is seen of it meanwhile.

Knows: figures of requests. Does not know: contents of requests, what the figures decide.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from molmo_server.engine_pool.remote import RemoteEngine

_REMEMBERED = 1000


def _latest() -> deque[float]:
    return deque(maxlen=_REMEMBERED)


@dataclass(kw_only=True)
class TrialFigures:
    """Seconds are those until the first bytes, of an answer in one piece until the last."""

    n_asked: int = 0
    n_failed: int = 0
    """Requests that the engine on trial broke on, refused alone, or held until their deadline."""
    n_compared: int = 0
    """Answers to the same greedy request that were compared with the serving engine's."""
    n_same: int = 0
    trial_s: deque[float] = field(default_factory=_latest)
    serving_s: deque[float] = field(default_factory=_latest)

    def as_dict(self) -> dict[str, Any]:
        medians = {
            name: round(statistics.median(seconds), 4) if seconds else None
            for name, seconds in (("trial", self.trial_s), ("serving", self.serving_s))
        }
        return {
            "asked": self.n_asked,
            "answered": len(self.trial_s),
            "failed": self.n_failed,
            "compared": self.n_compared,
            "same": self.n_same,
            "median_s": medians,
        }


@dataclass(kw_only=True, eq=False)
class Trial:
    engine: RemoteEngine
    is_open: bool = False
    """Whether callers get its answers: those who name its checkpoint, and the shares."""
    share: float = 0.0
    """Of requests that name no checkpoint, and are answered by it."""
    shadow_share: float = 0.0
    """Of greedy answers in one piece that it has to give as well, for a comparison."""
    figures: TrialFigures = field(default_factory=TrialFigures)

    def answers(self, checkpoint_id: str | None) -> bool:
        """Whether it is to answer this request; asking draws lots."""
        if not self.is_open:
            return False
        if checkpoint_id is not None:
            return checkpoint_id == self.engine.checkpoint_id
        return self.engine.ready.is_set() and random.random() < self.share

    def is_to_be_compared(self) -> bool:
        """Whether the answer just given is to be compared; asking draws lots."""
        return self.is_open and random.random() < self.shadow_share
