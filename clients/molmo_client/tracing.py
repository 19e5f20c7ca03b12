"""The caller's trace, sent along where the calling program has OpenTelemetry at work.

Knows: OpenTelemetry's current span, W3C's `traceparent`. Does not import OpenTelemetry: where the
program did not, there is no trace. Source: W3C Trace Context, version 00.
"""

from __future__ import annotations

import sys


def trace_headers() -> dict[str, str]:
    """`traceparent` of the caller's current span; empty without one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    flags = int(context.trace_flags)
    return {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"}
