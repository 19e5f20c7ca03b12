"""What a client raises: the leaves of `molmo_core.errors`, carrying the server's request id.

`except errors.Busy` and `except RequestFailed` both catch a full queue. Knows: statuses and
OpenAI's error body. Does not know: HTTP libraries, retries. Source: this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from molmo_core import errors
from molmo_core.errors import MolmoError

_LEAVES: tuple[type[MolmoError], ...] = (
    MolmoError,
    errors.InvalidRequest,
    errors.UnknownField,
    errors.ControlTokenInText,
    errors.PromptTooLong,
    errors.TooManyMedia,
    errors.InvalidMedia,
    errors.InvalidExample,
    errors.Unauthorised,
    errors.Forbidden,
    errors.NotFound,
    errors.ModelNotFound,
    errors.MediaNotFound,
    errors.PayloadTooLarge,
    errors.RateLimited,
    errors.EngineRefused,
    errors.EngineFailed,
    errors.EngineUnavailable,
    errors.Busy,
    errors.DeadlineExceeded,
    errors.CheckpointError,
    errors.DataError,
    errors.TrainingError,
    errors.KeyStoreError,
    errors.BatchStoreError,
    errors.UnsupportedEngine,
)
_BY_STATUS: dict[int, type[MolmoError]] = {
    401: errors.Unauthorised,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.DeadlineExceeded,
    413: errors.PayloadTooLarge,
    429: errors.RateLimited,
    502: errors.EngineFailed,
    503: errors.EngineUnavailable,
    504: errors.DeadlineExceeded,
}
_MAX_QUOTED = 200


class RequestFailed(MolmoError):
    """The server answered with an error; `request_id` finds it in the server's log."""

    request_id: str | None = None


class WrongUsage(errors.InvalidRequest):
    """The caller's own options or files make no sense; found before anything is sent."""


class ServerUnreachable(MolmoError):
    """No connection to the server, after all retries."""

    status = 503
    code = "server_unreachable"


class AnswerTimedOut(errors.DeadlineExceeded):
    """The server took the request and did not answer in time."""

    code = "answer_timed_out"


# One class per leaf, made here so that a leaf added to the tree needs one line, not two.
_RAISED: dict[type[MolmoError], type[RequestFailed]] = {
    leaf: type(leaf.__name__, (RequestFailed,) if leaf is MolmoError else (RequestFailed, leaf), {})
    for leaf in _LEAVES
}
_BY_CODE = {leaf.code: leaf for leaf in _LEAVES}


def failure_of(status: int, headers: Mapping[str, str], body: bytes) -> RequestFailed:
    """The error that an answer of `status` >= 400 stands for; any body will do."""
    details = _error_object(body)
    message = str(details.get("message") or _quoted(body) or "no text")
    leaf = _BY_CODE.get(str(details.get("code")), _leaf_of_status(status))
    param = details.get("param")
    error = _RAISED[leaf](
        message,
        param=None if param is None else str(param),
        retry_after_s=retry_after_s(headers),
    )
    error.status = status
    error.request_id = headers.get("x-request-id")
    return error


def _leaf_of_status(status: int) -> type[MolmoError]:
    fallback = errors.InvalidRequest if 400 <= status < 500 else MolmoError
    return _BY_STATUS.get(status, fallback)


def _error_object(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    details = parsed.get("error") if isinstance(parsed, dict) else None
    return details if isinstance(details, dict) else {}


def _quoted(body: bytes) -> str:
    text = body[: 4 * _MAX_QUOTED].decode("utf-8", errors="replace").strip()
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}…"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After` header given as a number; None without one."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
