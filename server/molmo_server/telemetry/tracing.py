"""OpenTelemetry: a request's spans, from the caller's `traceparent` to the engine's.

Off unless `MOLMO_OTLP_ENDPOINT` is set, and then nothing of OpenTelemetry is imported. Spans hold
counts, our own names and error codes: no prompts, media, keys, paths or messages.

A trace travels with the task that answers the request, in context variables; so the engine's
client finds the header to send without being handed it.

Knows: OpenTelemetry. Does not know: steps (`journey`), routes (`edge`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

TRACES_PATH = "/v1/traces"
"""Of an OTLP/HTTP endpoint."""
_TRACEPARENT = b"traceparent"
_EXPORT_S = 2.0
"""How long a collector may take for a batch; spans are dropped rather than waited for."""


class Tracing:
    """Opened where the settings name a collector; else `begin` returns None."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: base URL of an OTLP/HTTP collector, as http://127.0.0.1:4318."""
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        if endpoint is not None:
            self._provider = _provider(endpoint.rstrip("/") + TRACES_PATH)
            self._tracer = self._provider.get_tracer("molmo_server")

    def begin(self, headers: list[tuple[bytes, bytes]], request_id: str) -> RequestTrace | None:
        """The span of a request, under the caller's if it named one."""
        if self._tracer is None:
            return None
        trace = RequestTrace(self._tracer, headers, request_id)
        _TRACE.set(trace)
        return trace

    def close(self) -> None:
        """Send what is left; takes some seconds when the collector is away."""
        if self._provider is not None:
            self._provider.shutdown()


class RequestTrace:
    """One request's own span and those of its steps."""

    def __init__(self, tracer: Tracer, headers: list[tuple[bytes, bytes]], request_id: str) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Of a caller's headers only this one is read; `tracestate` would be passed on unread.
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in headers
            if name == _TRACEPARENT
        }
        parent = TraceContextTextMapPropagator().extract(carrier)
        self._tracer = tracer
        self._span = tracer.start_span(
            "request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"molmo.request_id": request_id},
        )
        self._context = set_span_in_context(self._span, parent)

    def step(self, name: str, facts: Mapping[str, Any], *, passes_on: bool) -> StepSpan:
        """A span under the request's; with `passes_on` engines that are asked get it as parent."""
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT if passes_on else SpanKind.INTERNAL
        span = StepSpan(self._tracer.start_span(name, context=self._context, kind=kind))
        span.tell(facts)
        if passes_on:
            context = span.span.get_span_context()
            flags = int(context.trace_flags)
            parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
            _OUTGOING.set({_TRACEPARENT.decode(): parent})
        return span

    def end(self, name: str, facts: Mapping[str, Any], error_code: str) -> None:
        self._span.update_name(name)
        StepSpan(self._span).tell(facts)
        StepSpan(self._span).end(error_code)


class StepSpan:
    def __init__(self, span: Span) -> None:
        self.span = span

    def tell(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self.span.set_attribute(name if "." in name else f"molmo.{name}", value)

    def event(self, name: str) -> None:
        self.span.add_event(name)

    def end(self, error_code: str) -> None:
        from opentelemetry.trace import StatusCode

        if error_code:
            self.span.set_attribute("error.type", error_code)
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


_TRACE: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)
_OUTGOING: ContextVar[dict[str, str] | None] = ContextVar("outgoing", default=None)


def current_trace() -> RequestTrace | None:
    """Of the request that this task answers."""
    return _TRACE.get()


def trace_headers() -> dict[str, str]:
    """What an engine is sent, so that its spans belong to the request's; empty without tracing."""
    return _OUTGOING.get() or {}


def _provider(endpoint: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Not the process's own provider: two applications may live in one process.
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "molmo-gateway"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
