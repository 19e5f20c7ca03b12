"""What the service tells of itself: one log line a request, metrics, a request id.

Knows: names of metrics and log fields. Never logs prompts, media, answers or headers of callers;
of an API key only its first letters and whose it is.
The id of a request is ours; what a caller sends as `x-request-id` is not passed on.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Callable

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molmo_core.errors import MolmoError, PayloadTooLarge
from molmo_server.errors import error_response
from molmo_server.tenancy.callers import caller_of

logger = logging.getLogger(__name__)

_CALLER_WENT = 499
"""Logged and counted as the status of a request that nobody waited for, or that was cut."""
_CHECKPOINT = "checkpoint_id"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


def configure_logging(level: str) -> None:
    """JSON lines on standard error (plain on a terminal), of this package and the web server."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    for name in ("molmo_server", "uvicorn"):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(level.upper() if name == "molmo_server" else logging.WARNING)


def tell_checkpoint(scope: Scope, checkpoint_id: str) -> str:
    """Say whose weights answer this request: in its header, its log line; returns the id."""
    scope["state"][_CHECKPOINT] = checkpoint_id
    return checkpoint_id


class Metrics:
    """One registry per application, so that two applications can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "molmo_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "molmo_request_seconds",
            "Time from first to last byte",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.observations = Counter(
            "molmo_observations", "Points and track points answered", ["kind"], registry=registry
        )
        self.checkpoint = Gauge(
            "molmo_checkpoint", "1 for the checkpoint that is served", ["id"], registry=registry
        )
        self.media_cache_hits = Counter(
            "molmo_media_cache_hits", "Media that had been looked at before", registry=registry
        )
        self.media_bytes = Gauge("molmo_media_bytes", "Uploaded files kept", registry=registry)
        self.running = Gauge("molmo_running", "Requests being answered", registry=registry)
        self.queued = Gauge("molmo_queued", "Requests waiting", registry=registry)
        self.engine_ready = Gauge(
            "molmo_engine_ready", "1 when the engine takes requests", ["engine"], registry=registry
        )
        self.engine_restarts = Gauge(
            "molmo_engine_restarts", "Starts after the first", ["engine"], registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Edge:
    """Outermost ASGI layer: request id, checkpoint header, body limit, log line, last resort."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        current_checkpoint: Callable[[], str],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._current_checkpoint = current_checkpoint
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.perf_counter()
        status, is_whole = 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                told = scope["state"].get(_CHECKPOINT) or self._current_checkpoint()
                headers = [
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % (1000 * (time.perf_counter() - began))),
                    (b"x-molmo-checkpoint", told.encode()),
                    *caller_of(scope).headers(),
                ]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, self._limited(scope, receive), send_with_headers)
        # The edge: whatever it is, the caller gets an envelope and the log the reason.
        except Exception:
            logger.exception("unforeseen failure", extra={"request_id": request_id})
            if status != 0:
                raise  # the server then cuts the connection: the answer is not complete
            message = "the service failed on this request; its id finds it in the log"
            await error_response(MolmoError(message))(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - began
            self._note(scope, request_id, status if is_whole else _CALLER_WENT, seconds)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Counts the bytes that arrive; a header is trusted only when it tells of too many."""
        declared = dict(scope["headers"]).get(b"content-length", b"")
        is_refused = declared.isdigit() and int(declared) > self._max_body_bytes
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = {} if is_refused else await receive()
            n_bytes += len(message.get("body", b""))
            if is_refused or n_bytes > self._max_body_bytes:
                raise PayloadTooLarge(
                    f"the body has more than {self._max_body_bytes:,} bytes, which is what is "
                    "allowed; send fewer or smaller media"
                )
            return message

        return counted

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # The template of the path, never the path itself: callers choose that.
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        extra = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "checkpoint": scope["state"].get(_CHECKPOINT, ""),
            **caller_of(scope).log_fields(),
        }
        logger.info("request", extra=extra)
