"""What is served, what was served, and what was tried: the memory of a rollout.

Knows: ids, outcomes, reasons. Does not know: stores, engines.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from molmo_server.checkpoints.folder import Checkpoint

logger = logging.getLogger(__name__)

Outcome = Literal["serving", "refused", "superseded"]
_REMEMBERED = 100


@dataclass(kw_only=True)
class LiveCheckpoint:
    """The one place that knows what is served; read it at the moment of use."""

    current: Checkpoint
    previous: Checkpoint | None = None
    candidate: Checkpoint | None = None
    """What an engine on trial has."""

    def of(self, checkpoint_id: str) -> Checkpoint:
        """The one of that id, the current one when there is none, or an engine did not say."""
        known = (self.candidate, self.previous)
        return next((c for c in known if c is not None and c.id == checkpoint_id), self.current)


@dataclass(frozen=True, kw_only=True)
class Event:
    """What was tried and how it ended."""

    checkpoint: str
    outcome: Outcome
    reason: str
    time_s: float
    """Seconds since 1970."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each phase, by engine and phase; empty when nothing was loaded."""
    canary: dict[str, Any] = field(default_factory=dict)
    """What was seen of it on callers' requests, see `TrialFigures`; empty without a canary."""


class History:
    """The last hundred events, the oldest first."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque(maxlen=_REMEMBERED)
        self.on_event: Callable[[Event], None] = lambda event: None

    def note(
        self,
        checkpoint: str,
        outcome: Outcome,
        reason: str,
        *,
        seconds: dict[str, float] | None = None,
        canary: dict[str, Any] | None = None,
    ) -> Event:
        if outcome == "serving":
            superseded = (
                replace(event, outcome="superseded") if event.outcome == "serving" else event
                for event in self.events
            )
            self.events = deque(superseded, maxlen=_REMEMBERED)
        event = Event(
            checkpoint=checkpoint,
            outcome=outcome,
            reason=reason,
            time_s=time.time(),
            seconds=seconds or {},
            canary=canary or {},
        )
        self.events.append(event)
        self.on_event(event)
        logger.info("checkpoint %s: %s, %s", checkpoint, outcome, reason)
        return event

    def last_refusal(self, checkpoint_id: str) -> str | None:
        """Why it was not served when it was tried last; None when it was, or was never tried."""
        tried = [event for event in self.events if event.checkpoint == checkpoint_id]
        return tried[-1].reason if tried and tried[-1].outcome == "refused" else None
