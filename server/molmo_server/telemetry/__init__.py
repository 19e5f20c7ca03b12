"""What the service tells of itself: one log line a request, metrics, traces, a request id.

edge            the outermost layer of the application: ids, headers, limits, the last resort
logs            how log lines are written
metrics         names of the gateway's metrics
engine_metrics  the engines' own metrics, passed on with the engine's name
tracing         OpenTelemetry, only where it is asked for
journey         the steps of one request, as times and as spans
"""

from molmo_server.telemetry.edge import Edge, tell_checkpoint
from molmo_server.telemetry.journey import Journey
from molmo_server.telemetry.logs import configure_logging
from molmo_server.telemetry.metrics import Metrics
from molmo_server.telemetry.tracing import Tracing, trace_headers

__all__ = [
    "Edge",
    "Journey",
    "Metrics",
    "Tracing",
    "configure_logging",
    "tell_checkpoint",
    "trace_headers",
]
