"""The lines of a batch: what a caller wrote, what is written back.

A line is a JSON object with `custom_id`, `method`, `url` and `body`. Files are read line by line,
and of a line no more than is allowed is ever in memory.

Knows: the format of both files, what makes a line bad. Does not know: who answers, the store.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError

from molmo_core.api_batches import BatchError
from molmo_core.api_requests import StrictRequest
from molmo_core.errors import InvalidRequest
from molmo_server.errors import from_validation

_BOM = b"\xef\xbb\xbf"
_MAX_ERRORS = 100
"""So many bad lines are told of."""
_PIECE_BYTES = 1024 * 1024


class _Line(StrictRequest):
    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Line:
    number: int
    """In the file, from 1; empty lines count."""
    custom_id: str
    body: bytes
    """The request, as JSON."""


class BadLine(Exception):
    def __init__(self, code: str, message: str, *, number: int, param: str | None = None) -> None:
        super().__init__(message)
        self.told = BatchError(code=code, message=message, param=param, line=number)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the lines of one batch are read."""

    endpoint: str
    max_line_bytes: int
    max_lines: int

    def lines(self, path: Path) -> Iterator[Line]:
        """Those of a file that was checked, perhaps when more was allowed; raises OSError."""
        checked = replace(self, max_line_bytes=sys.maxsize - 1)
        for number, raw in checked._raw(path):
            yield checked._line(number, raw)

    def check(self, path: Path) -> tuple[int, list[BatchError]]:
        """(number of requests, what is wrong with the file); raises OSError."""
        errors: list[BatchError] = []
        n_lines, seen = 0, set[bytes]()
        for number, raw in self._raw(path):
            n_lines += 1
            if n_lines > self.max_lines:
                errors.append(
                    BatchError(
                        code="too_many_lines",
                        message=f"the file has more than {self.max_lines:,} requests, which is "
                        "what a batch may have; send several",
                        line=number,
                    )
                )
                break
            try:
                line = self._line(number, raw)
                # Of names as long as allowed, the digests take a tenth of the memory.
                name = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
                if name in seen:
                    raise BadLine(
                        "duplicate_custom_id",
                        f"the custom_id {line.custom_id[:100]!r} is there before; give each line "
                        "one of its own",
                        number=number,
                        param="custom_id",
                    )
                seen.add(name)
            except BadLine as bad:
                errors.append(bad.told)
                if len(errors) == _MAX_ERRORS:
                    break
        if n_lines == 0:
            message = "the file has no lines; write one request, a JSON object, a line"
            errors.append(BatchError(code="empty_file", message=message))
        return n_lines, errors

    def _raw(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """(number, text) of lines that are not empty; too long ones are cut, so that it shows."""
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(self.max_line_bytes + 1):
                number += 1
                if len(raw) > self.max_line_bytes:
                    rest = raw
                    while rest and not rest.endswith(b"\n"):
                        rest = file.readline(_PIECE_BYTES)
                    yield number, raw
                elif text := (raw.removeprefix(_BOM) if number == 1 else raw).strip():
                    yield number, text

    def _line(self, number: int, raw: bytes) -> Line:
        if len(raw) > self.max_line_bytes:
            raise BadLine(
                "line_too_long",
                f"the line has more than {self.max_line_bytes:,} bytes, which is what a request "
                "may have; upload media with POST /v1/media and name them by their ids",
                number=number,
            )
        try:
            content = orjson.loads(raw)
            if not isinstance(content, dict):
                raise BadLine(
                    "invalid_json_line",
                    "the line is JSON and no object; write custom_id, method, url and body in {}",
                    number=number,
                )
            line = _Line.model_validate(content)
            body = orjson.dumps(line.body)
        except orjson.JSONDecodeError as error:
            raise BadLine(
                "invalid_json_line", f"the line is not JSON: {error}", number=number
            ) from error
        except ValidationError as error:
            found: InvalidRequest = from_validation(error)
            raise BadLine(found.code, found.message, number=number, param=found.param) from error
        except TypeError as error:  # orjson reads deeper than it writes
            raise BadLine(
                "invalid_json_line", f"the body cannot be passed on: {error}", number=number
            ) from error
        if line.url != self.endpoint:
            raise BadLine(
                "mismatched_url",
                f"got the url {line.url[:100]!r}, the batch is for {self.endpoint}; a batch has "
                "one endpoint",
                number=number,
                param="url",
            )
        if line.body.get("stream"):
            raise BadLine(
                "invalid_request",
                "the lines of a batch are answered whole; leave stream out",
                number=number,
                param="body.stream",
            )
        return Line(number=number, custom_id=line.custom_id, body=body)


def answered(custom_id: str, *, status: int, request_id: str, body: bytes) -> bytes:
    """The line of the file of answers, with its end."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode(errors="replace")
    response = {"status_code": status, "request_id": request_id, "body": content}
    return _written(custom_id, response=response, error=None)


def unanswered(custom_id: str, *, code: str, message: str) -> bytes:
    """As `answered`, of a line without an answer."""
    return _written(custom_id, response=None, error={"code": code, "message": message})


def _written(custom_id: str, **fields: Any) -> bytes:
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, **fields}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
