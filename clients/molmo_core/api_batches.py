"""Files and batches, as OpenAI's endpoints of these names have them.

A batch is a file of requests, one JSON object a line; its answers are a file of the same kind.
Times are seconds since 1970, sizes bytes.

Knows: names and types on the wire. Does not know: how lines are run, HTTP.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from molmo_core.api_requests import StrictRequest

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED: tuple[BatchStatus, ...] = ("failed", "completed", "expired", "cancelled")
FilePurpose = Literal["batch", "batch_output"]

_HOUR_S = 3600
_WINDOW = re.compile(r"([1-9]\d{0,2})h")
_MAX_WINDOW_H = 168
Ttl = Annotated[int, Field(ge=_HOUR_S, le=30 * 24 * _HOUR_S)]
"""Seconds; OpenAI's range."""


def window_s(text: str) -> int:
    """Seconds of a completion window as `24h`; raises ValueError."""
    found = _WINDOW.fullmatch(text)
    hours = int(found[1]) if found else 0
    if not 1 <= hours <= _MAX_WINDOW_H:
        raise ValueError(f"got {text[:20]!r}; name hours from 1h to {_MAX_WINDOW_H}h, as 24h")
    return hours * _HOUR_S


class ExpiresAfter(StrictRequest):
    anchor: Literal["created_at"]
    seconds: Ttl


class BatchRequest(StrictRequest):
    """What `POST /v1/batches` takes."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_window(cls, text: str) -> str:
        window_s(text)
        return text


class _Told(BaseModel):
    """Clients accept fields of newer servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class File(_Told):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: FilePurpose
    status: Literal["processed"] = "processed"


class FileList(_Told):
    """Newest first, unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class DeletedFile(_Told):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchError(_Told):
    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1."""


class BatchErrors(_Told):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(_Told):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(_Told):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    """Answers with status 200, in the order of the input."""
    error_file_id: str | None = None
    """Answers with another status, and lines that were not answered in time."""
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class BatchList(_Told):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class LineResponse(_Told):
    status_code: int
    request_id: str
    body: Any


class LineError(_Told):
    code: str
    message: str


class LineResult(_Told):
    """A line of a file of answers: a response, or the reason why there is none."""

    id: str
    custom_id: str
    response: LineResponse | None = None
    error: LineError | None = None
