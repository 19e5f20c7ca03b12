"""The steps of one request through the gateway: how long each took, as metrics and as spans.

    queue    until it is this request's turn
    media    its pictures and videos are fetched and checked
    routing  until an engine is ready to be asked
    prompt   its prompt is measured for that engine
    engine   the engine's answer, until its end

The last three come again when a broken engine's request is sent once more.

Knows: the order, a clock. Does not know: what happens in a step. With tracing off a step costs a
look at the clock and one observation.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal, Self

from molmo_core.errors import MolmoError
from molmo_server.telemetry.metrics import Metrics
from molmo_server.telemetry.tracing import current_trace

if TYPE_CHECKING:
    from molmo_server.telemetry.tracing import StepSpan

Step = Literal["queue", "media", "routing", "prompt", "engine"]


class Journey:
    """All steps are inside its block; what ends it ends the last one."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._trace = current_trace()
        self._step: Step | None = None
        self._span: StepSpan | None = None
        self._began_s = self._step_began_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._has_ended = False

    def begin(self, step: Step, **facts: Any) -> None:
        """End the step before, begin this one; `facts` (numbers, our own names) go to its span."""
        if self._has_ended:
            return
        self._end_step(time.perf_counter())
        self._step = step
        if self._trace is not None:
            self._span = self._trace.step(step, facts, passes_on=step == "engine")

    def tell(self, **facts: Any) -> None:
        """Add to the span of the step."""
        if self._span is not None:
            self._span.tell(facts)

    def first_token(self, checkpoint_id: str) -> None:
        """The first bytes of a stream have arrived."""
        self._first_token_s = time.perf_counter()
        waited_s = self._first_token_s - self._began_s
        self._metrics.first_token.labels(checkpoint_id).observe(waited_s)
        if self._span is not None:
            self._span.event("first token")

    def tokens(self, checkpoint_id: str, *, prompt: int, visual: int, completion: int) -> None:
        """What an answer was computed from and how long it became; call it once, at its end."""
        metrics = self._metrics
        metrics.prompt_tokens.labels(checkpoint_id).inc(prompt)
        metrics.visual_tokens.labels(checkpoint_id).inc(visual)
        metrics.completion_tokens.labels(checkpoint_id).inc(completion)
        if self._first_token_s is not None and completion > 1:
            took_s = time.perf_counter() - self._first_token_s
            metrics.inter_token.labels(checkpoint_id).observe(took_s / (completion - 1))
        self.tell(n_prompt_tokens=prompt, n_visual_tokens=visual, n_completion_tokens=completion)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        error_code = ""
        if isinstance(error, MolmoError):
            error_code = error.code
        elif isinstance(error, asyncio.CancelledError):
            error_code = "cancelled"
        self._end_step(time.perf_counter(), error_code)
        self._has_ended = True

    def _end_step(self, now_s: float, error_code: str = "") -> None:
        if self._step is not None and self._step != "engine":
            self._metrics.step_seconds.labels(self._step).observe(now_s - self._step_began_s)
        if self._span is not None:
            self._span.end(error_code)
        self._step, self._span, self._step_began_s = None, None, now_s
