"""The gateway's metrics: their names, what they count, in which steps.

Labels come from this service (templates of routes, error codes, names of engines, ids of
checkpoints), never from what a caller sent.

Knows: names. Does not know: when something happens. Nothing here is called for each piece of a
stream: a stream is observed twice, at its first bytes and at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from molmo_server.checkpoints.live import Event
    from molmo_server.engine_pool import RemoteEngine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_SHORT_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """One registry per application, so that two applications can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._add_requests()
        self._add_answers()
        self._add_media()
        self._add_engines()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        counter = Counter(f"molmo_{name}", what, labels, registry=self.registry)
        return _remembering(counter)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"molmo_{name}", what, labels, registry=self.registry)

    def _seconds(
        self, name: str, what: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        full = f"molmo_{name}_seconds"
        histogram = Histogram(full, what, labels, buckets=buckets, registry=self.registry)
        return _remembering(histogram)

    def _add_requests(self) -> None:
        self.requests = self._counter("requests", "Requests answered", "route", "status")
        self.seconds = self._seconds("request", "Time from first to last byte", "route")
        self.errors = self._counter("errors", "Requests that failed, by the error's code", "code")
        self.running = self._gauge("running", "Requests being answered")
        self.queued = self._gauge("queued", "Requests waiting")
        self.step_seconds = self._seconds(
            "step",
            "Time of a request in each step before the engine is asked",
            "step",
            buckets=_SHORT_SECONDS,
        )

    def _add_answers(self) -> None:
        self.first_token = self._seconds(
            "time_to_first_token",
            "From a stream's request being read to the engine's first bytes",
            "checkpoint",
        )
        self.inter_token = self._seconds(
            "inter_token",
            "Mean time between two tokens, one observation a stream",
            "checkpoint",
            buckets=_TOKEN_SECONDS,
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of answered prompts, with visual ones", "checkpoint"
        )
        self.visual_tokens = self._counter(
            "visual_tokens", "Of these, those of pictures and frames", "checkpoint"
        )
        self.completion_tokens = self._counter(
            "completion_tokens", "Tokens of answers", "checkpoint"
        )
        self.observations = self._counter(
            "observations", "Points and track points answered", "kind"
        )

    def _add_media(self) -> None:
        self.media_looks = self._counter("media_looks", "Media looked at for the first time")
        self.media_cache_hits = self._counter(
            "media_cache_hits", "Media that had been looked at before"
        )
        self.media_bytes = self._gauge("media_bytes", "Uploaded files kept")
        self.uploads = self._counter("uploads", "Files uploaded and kept")
        self.upload_bytes = self._counter("upload_bytes", "Their bytes")

        self.batch_lines = self._counter("batch_lines", "Lines of batches answered", "status")
        self.batches = self._gauge("batches", "Batches that have not ended")

    def _add_engines(self) -> None:
        self.checkpoint = self._gauge("checkpoint", "1 for the checkpoint that is served", "id")
        self.rollouts = self._counter("rollouts", "Changes of checkpoint tried", "outcome")
        self.rollout_seconds = self._seconds("rollout", "Time of those that were made")
        self.engine_ready = self._gauge(
            "engine_ready", "1 when the engine takes requests", "engine"
        )
        self.engine_state = self._gauge(
            "engine_state", "1 for the state that the engine is in", "engine", "state"
        )
        self.engine_restarts = self._gauge("engine_restarts", "Starts after the first", "engine")
        self.engine_in_flight = self._gauge(
            "engine_in_flight", "Requests that the engine is answering", "engine"
        )

    def show_engines(self, engines: Iterable[RemoteEngine]) -> None:
        """Set what is told of these engines, and tell of no others."""
        for gauge in (
            self.engine_ready,
            self.engine_state,
            self.engine_restarts,
            self.engine_in_flight,
        ):
            gauge.clear()
        for engine in engines:
            self.engine_ready.labels(engine.name).set(engine.ready.is_set())
            self.engine_restarts.labels(engine.name).set(engine.n_restarts)
            self.engine_in_flight.labels(engine.name).set(engine.n_in_flight)
            for state in type(engine.state):
                self.engine_state.labels(engine.name, state.value).set(engine.state is state)

    def note_rollout(self, event: Event) -> None:
        """A change of checkpoint was made, or refused."""
        self.rollouts.labels(event.outcome).inc()
        if event.outcome == "serving" and event.seconds:
            self.rollout_seconds.observe(sum(event.seconds.values()))

    def text(self) -> bytes:
        return generate_latest(self.registry)


MetricT = TypeVar("MetricT", Counter, Histogram)


def _remembering(metric: MetricT) -> MetricT:
    """Of a metric that is never cleared: the library takes longer to find what has these labels
    than to count."""
    metric.labels = cache(metric.labels)  # type: ignore[method-assign]
    return metric
