"""Batches from Python: `Client.batches`.

A batch is a file of requests, one JSON object a line, that the server answers in the background:
`{"custom_id": "a", "method": "POST", "url": "/v1/point", "body": {…}}`.

Knows: files and batches on the wire. Does not know: what lines ask, terminals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx2

from molmo_client.calls import Answer, Call
from molmo_client.connection import Connection
from molmo_client.failures import WrongUsage, failure_of
from molmo_core.api_batches import Batch, BatchList, BatchRequest, File, LineResult

_PIECE_BYTES = 256 * 1024
_POLL_S = 1.0


class _Ask(Protocol):
    def __call__(self, call: Call[Answer]) -> Answer: ...


class Batches:
    """Methods raise as those of the client do."""

    def __init__(self, ask: _Ask, http: httpx2.Client, connection: Connection) -> None:
        self._ask = ask
        self._http = http
        self._connection = connection

    def upload(self, path: Path) -> File:
        """Send a file of requests; it is read while it is sent. Raises WrongUsage without one."""
        if not path.is_file():
            raise WrongUsage(f"there is no file {path}; name a file of requests, one a line")
        with path.open("rb") as content:
            call = Call(method="POST", path="/v1/files", body=None, file=content, answer_type=File)
            return self._ask(call)

    def submit(self, requests: Path | File, endpoint: str, *, window: str = "24h") -> Batch:
        """Have requests answered; `endpoint` is the `url` of all lines, as /v1/point."""
        file = requests if isinstance(requests, File) else self.upload(requests)
        asked = BatchRequest(input_file_id=file.id, endpoint=endpoint, completion_window=window)
        body = asked.model_dump_json(exclude_none=True).encode()
        return self._ask(Call(method="POST", path="/v1/batches", body=body, answer_type=Batch))

    def get(self, batch_id: str) -> Batch:
        path = f"/v1/batches/{batch_id}"
        return self._ask(Call(method="GET", path=path, body=None, answer_type=Batch))

    def cancel(self, batch_id: str) -> Batch:
        path = f"/v1/batches/{batch_id}/cancel"
        return self._ask(Call(method="POST", path=path, body=None, answer_type=Batch))

    def latest(self, limit: int = 20) -> list[Batch]:
        """Newest first."""
        path = f"/v1/batches?limit={limit}"
        call = Call(method="GET", path=path, body=None, answer_type=BatchList)
        return self._ask(call).data

    def wait(self, batch_id: str, *, on_change: Callable[[Batch], object] | None = None) -> Batch:
        """The batch when it has ended; `on_change` is told how far it is."""
        told = None
        while True:
            batch = self.get(batch_id)
            if batch != told and on_change is not None:
                on_change(batch)
            told = batch
            if batch.has_ended:
                return batch
            time.sleep(_POLL_S)

    def results(self, batch: Batch) -> Iterator[LineResult]:
        """What lines were answered: first those with success, in order, then the others."""
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                with self._content(file_id) as response:
                    for text in response.iter_lines():
                        yield LineResult.model_validate_json(text)

    def download(self, file_id: str, to: BinaryIO) -> None:
        """A file as it is."""
        with self._content(file_id) as response:
            for piece in response.iter_bytes(_PIECE_BYTES):
                to.write(piece)

    @contextmanager
    def _content(self, file_id: str) -> Iterator[httpx2.Response]:
        try:
            with self._http.stream("GET", f"/v1/files/{file_id}/content") as response:
                if response.status_code >= 400:
                    raise failure_of(response.status_code, response.headers, response.read())
                yield response
        except httpx2.TransportError as failure:
            raise self._connection.failure(failure) from failure
