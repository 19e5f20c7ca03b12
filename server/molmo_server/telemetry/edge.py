"""The outermost layer of the application: whatever happens inside, this is what a caller gets.

Knows: ids, headers of every answer, the limit of a body, what is noted of a request: a line in the
log, its metrics, its trace. Does not know: routes, what is answered.
The id of a request is ours; what a caller sends as `x-request-id` is not passed on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molmo_core.errors import EngineUnavailable, MolmoError, PayloadTooLarge
from molmo_server.errors import error_code_of, error_response, note_error
from molmo_server.telemetry.metrics import Metrics
from molmo_server.telemetry.tracing import Tracing
from molmo_server.tenancy.callers import caller_of
from molmo_server.web.headers import browser_headers

logger = logging.getLogger(__name__)

_CALLER_WENT = 499
"""Logged and counted as the status of a request that nobody waited for, or that was cut."""
_CALLER_WENT_CODE = "caller_left"
_CHECKPOINT = "checkpoint_id"
_UNTRACED = ("/health", "/ready", "/metrics")
"""Asked all the time by machines."""


def tell_checkpoint(scope: Scope, checkpoint_id: str) -> str:
    """Say whose weights answer this request: in its header, its log line; returns the id."""
    scope["state"][_CHECKPOINT] = checkpoint_id
    return checkpoint_id


class Edge:
    """Outermost ASGI layer: request id, checkpoint header, body limit, log line, last resort."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        tracing: Tracing,
        current_checkpoint: Callable[[], str],
        max_body_bytes: int,
        larger_bodies: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`larger_bodies`: paths that take more, with how many bytes."""
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._current_checkpoint = current_checkpoint
        self._max_body_bytes = max_body_bytes
        self._larger_bodies = larger_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.perf_counter()
        trace = None
        if scope["path"] not in _UNTRACED:
            trace = self._tracing.begin(scope["headers"], request_id)
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
                    *browser_headers(scope["path"], message["headers"]),
                ]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, self._limited(scope, receive), send_with_headers)
        except asyncio.CancelledError:  # the server ends, and has waited as long as it may
            if status == 0:
                ending = EngineUnavailable(
                    "this server is ending; send the request again, to another", retry_after_s=1
                )
                note_error(scope, ending)
                await error_response(ending)(scope, receive, send_with_headers)
            raise
        # The edge: whatever it is, the caller gets an envelope and the log the reason.
        except Exception:
            logger.exception("unforeseen failure", extra={"request_id": request_id})
            if status != 0:
                raise  # the server then cuts the connection: the answer is not complete
            error = MolmoError("the service failed on this request; its id finds it in the log")
            note_error(scope, error)
            await error_response(error)(scope, receive, send_with_headers)
        finally:
            if not is_whole:
                status = _CALLER_WENT
            fields = self._note(scope, request_id, status, time.perf_counter() - began)
            if trace is not None:
                facts = {
                    "http.request.method": scope["method"],
                    "http.route": fields["route"],
                    "http.response.status_code": status,
                    "checkpoint": fields["checkpoint"],
                }
                trace.end(f"{scope['method']} {fields['route']}", facts, self._code(scope, status))

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Counts the bytes that arrive; a header is trusted only when it tells of too many."""
        max_bytes = self._larger_bodies.get(scope["path"], self._max_body_bytes)
        declared = dict(scope["headers"]).get(b"content-length", b"")
        is_refused = declared.isdigit() and int(declared) > max_bytes
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = {} if is_refused else await receive()
            n_bytes += len(message.get("body", b""))
            if is_refused or n_bytes > max_bytes:
                raise PayloadTooLarge(
                    f"the body has more than {max_bytes:,} bytes, which is what is "
                    "allowed; send fewer or smaller media"
                )
            return message

        return counted

    def _note(
        self, scope: Scope, request_id: str, status: int, seconds: float
    ) -> dict[str, str | int | float]:
        """Count and log a request; returns what was logged."""
        # The template of the path, never the path itself: callers choose that.
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if code := self._code(scope, status):
            self._metrics.errors.labels(code).inc()
        fields: dict[str, str | int | float] = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "checkpoint": scope["state"].get(_CHECKPOINT, ""),
            **caller_of(scope).log_fields(),
        }
        logger.info("request", extra=fields)
        return fields

    def _code(self, scope: Scope, status: int) -> str:
        """Of what went wrong; empty when nothing did."""
        return error_code_of(scope) or (_CALLER_WENT_CODE if status == _CALLER_WENT else "")
