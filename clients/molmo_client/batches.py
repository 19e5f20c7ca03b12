"""Batches from Python: `Client.batches`, `AsyncClient.batches`.

A batch is a file of requests, one JSON object a line, that the server answers in the background:
`{"custom_id": "a", "method": "POST", "url": "/v1/point", "body": {…}}`.

Knows: files and batches on the wire. Does not know: what lines ask, terminals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx2

from molmo_client.calls import Answer, Call
from molmo_client.connection import Connection
from molmo_client.failures import WrongUsage, failure_of
from molmo_core.api_batches import Batch, BatchList, BatchRequest, File, LineResult

_PIECE_BYTES = 256 * 1024
_FIRST_POLL_S, _LONGEST_POLL_S = 0.5, 10.0


class _Ask(Protocol):
    def __call__(self, call: Call[Answer]) -> Answer: ...


class _AskAsync(Protocol):
    async def __call__(self, call: Call[Answer]) -> Answer: ...


class Batches:
    """Methods raise as those of the client do."""

    def __init__(self, ask: _Ask, http: httpx2.Client, connection: Connection) -> None:
        self._ask = ask
        self._http = http
        self._connection = connection

    def upload(self, path: Path) -> File:
        """Send a file of requests; it is read while it is sent. Raises WrongUsage without one."""
        with _opened(path) as content:
            return self._ask(_upload(content))

    def submit(self, requests: Path | File, endpoint: str, *, window: str = "24h") -> Batch:
        """Have requests answered; `endpoint` is the `url` of all lines, as /v1/point."""
        file = requests if isinstance(requests, File) else self.upload(requests)
        return self._ask(_submit(file, endpoint, window))

    def get(self, batch_id: str) -> Batch:
        return self._ask(_get(batch_id))

    def cancel(self, batch_id: str) -> Batch:
        return self._ask(_cancel(batch_id))

    def latest(self, limit: int = 20) -> list[Batch]:
        """Newest first."""
        return self._ask(_latest(limit)).data

    def wait(self, batch_id: str, *, on_change: Callable[[Batch], object] | None = None) -> Batch:
        """The batch when it has ended; `on_change` is told how far it is."""
        told = None
        for pause_s in _pauses_s():
            batch = self.get(batch_id)
            if batch != told and on_change is not None:
                on_change(batch)
            told = batch
            if batch.has_ended:
                break
            time.sleep(pause_s)
        return batch

    def results(self, batch: Batch) -> Iterator[LineResult]:
        """What lines were answered: first those with success, in order, then the others."""
        for file_id in _result_files(batch):
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
            with self._http.stream("GET", _content_path(file_id)) as response:
                if response.status_code >= 400:
                    raise failure_of(response.status_code, response.headers, response.read())
                yield response
        except httpx2.TransportError as failure:
            raise self._connection.failure(failure) from failure


class AsyncBatches:
    """As `Batches`, awaited. A file is read in small pieces, between other work."""

    def __init__(self, ask: _AskAsync, http: httpx2.AsyncClient, connection: Connection) -> None:
        self._ask = ask
        self._http = http
        self._connection = connection

    async def upload(self, path: Path) -> File:
        """Send a file of requests; it is read while it is sent. Raises WrongUsage without one."""
        with _opened(path) as content:
            return await self._ask(_upload(content))

    async def submit(self, requests: Path | File, endpoint: str, *, window: str = "24h") -> Batch:
        """Have requests answered; `endpoint` is the `url` of all lines, as /v1/point."""
        file = requests if isinstance(requests, File) else await self.upload(requests)
        return await self._ask(_submit(file, endpoint, window))

    async def get(self, batch_id: str) -> Batch:
        return await self._ask(_get(batch_id))

    async def cancel(self, batch_id: str) -> Batch:
        return await self._ask(_cancel(batch_id))

    async def latest(self, limit: int = 20) -> list[Batch]:
        """Newest first."""
        return (await self._ask(_latest(limit))).data

    async def wait(
        self, batch_id: str, *, on_change: Callable[[Batch], object] | None = None
    ) -> Batch:
        """The batch when it has ended; `on_change` is told how far it is."""
        told = None
        for pause_s in _pauses_s():
            batch = await self.get(batch_id)
            if batch != told and on_change is not None:
                on_change(batch)
            told = batch
            if batch.has_ended:
                break
            await asyncio.sleep(pause_s)
        return batch

    async def results(self, batch: Batch) -> AsyncIterator[LineResult]:
        """What lines were answered: first those with success, in order, then the others."""
        for file_id in _result_files(batch):
            async with self._content(file_id) as response:
                async for text in response.aiter_lines():
                    yield LineResult.model_validate_json(text)

    async def download(self, file_id: str, to: BinaryIO) -> None:
        """A file as it is."""
        async with self._content(file_id) as response:
            async for piece in response.aiter_bytes(_PIECE_BYTES):
                to.write(piece)

    @asynccontextmanager
    async def _content(self, file_id: str) -> AsyncIterator[httpx2.Response]:
        try:
            async with self._http.stream("GET", _content_path(file_id)) as response:
                if response.status_code >= 400:
                    raise failure_of(response.status_code, response.headers, await response.aread())
                yield response
        except httpx2.TransportError as failure:
            raise self._connection.failure(failure) from failure


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise WrongUsage(f"there is no file {path}; name a file of requests, one a line")
    return path.open("rb")


def _upload(content: BinaryIO) -> Call[File]:
    return Call(method="POST", path="/v1/files", body=None, file=content, answer_type=File)


def _submit(file: File, endpoint: str, window: str) -> Call[Batch]:
    asked = BatchRequest(input_file_id=file.id, endpoint=endpoint, completion_window=window)
    body = asked.model_dump_json(exclude_none=True).encode()
    return Call(method="POST", path="/v1/batches", body=body, answer_type=Batch)


def _get(batch_id: str) -> Call[Batch]:
    return Call(method="GET", path=f"/v1/batches/{batch_id}", body=None, answer_type=Batch)


def _cancel(batch_id: str) -> Call[Batch]:
    path = f"/v1/batches/{batch_id}/cancel"
    return Call(method="POST", path=path, body=None, answer_type=Batch)


def _latest(limit: int) -> Call[BatchList]:
    path = f"/v1/batches?limit={limit}"
    return Call(method="GET", path=path, body=None, answer_type=BatchList)


def _pauses_s() -> Iterator[float]:
    """Between two looks at a batch, without an end."""
    pause_s = _FIRST_POLL_S
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, _LONGEST_POLL_S)


def _result_files(batch: Batch) -> list[str]:
    return [name for name in (batch.output_file_id, batch.error_file_id) if name is not None]


def _content_path(file_id: str) -> str:
    return f"/v1/files/{file_id}/content"
