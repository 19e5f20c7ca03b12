"""The two clients: the same typed methods, waiting or awaited.

Knows: sending, waiting between tries, giving up. Does not know: bodies and paths (`calls`), which
failures are worth another try (`retries`). Source: this project's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self, Unpack

import httpx2

from molmo_client import calls
from molmo_client.batches import AsyncBatches, Batches
from molmo_client.calls import Answer, Call, Generation, PointingVerb, What
from molmo_client.connection import Arriving, Connection, connection_to
from molmo_client.events import VerbEvents
from molmo_client.failures import failure_of
from molmo_client.media import MediaInput, OneMedia
from molmo_client.retries import RetryPolicy, random_jitter
from molmo_core import api

_LOG = logging.getLogger(__name__)
_LIVE_PATH, _READY_PATH = "/health", "/ready"


class Client:
    """Asks a Molmo server. Safe to share between threads; close it, or use it in a `with`.

    Methods raise leaves of `molmo_core.errors.MolmoError`: for a refused request with the
    server's `request_id`, `ServerUnreachable` without a server, `AnswerTimedOut` without an
    answer. `media` is one picture, a list of pictures, or one video; see `media.OneMedia`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        answer_timeout_s: float = 600.0,
        retries: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.connection: Connection = connection_to(
            url, api_key=api_key, answer_timeout_s=answer_timeout_s, retries=retries
        )
        self._http = httpx2.Client(transport=transport, **self.connection.httpx_options())
        self.batches = Batches(self._answer, self._http, self.connection)

    def point(
        self, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.PointAnswer:
        """Where every `object` ("the red circle") is; several are asked about one by one."""
        return self._answer(calls.point(media, object, options))

    def count(
        self, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.CountAnswer:
        """How many there are, and where."""
        return self._answer(calls.count(media, object, options))

    def track(
        self, video: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.TrackAnswer:
        """Where every `object` is in each frame that the model saw."""
        return self._answer(calls.track(video, object, options))

    def caption(self, media: MediaInput, **options: Unpack[Generation]) -> api.CaptionAnswer:
        """What is to be seen, in a sentence or two."""
        return self._answer(calls.caption(media, options))

    def query(
        self, media: MediaInput, question: str, **options: Unpack[Generation]
    ) -> api.QueryAnswer:
        """Any question; places in the answer come as `grounding`."""
        return self._answer(calls.query(media, question, options))

    ask = query

    def stream(
        self, verb: PointingVerb, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> Iterator[api.Observation | api.PointingAnswer]:
        """Places as they are written, and at last the answer that the verb's method gives."""
        call = calls.streamed(verb, media, object, options)
        events = VerbEvents(call)
        response = self._response(call, is_streamed=True)
        try:
            if response.status_code >= 400:
                call.read(response)
            for line in response.iter_lines():
                yield from events.feed(line)
        except httpx2.TransportError as failure:
            raise self.connection.failure(failure) from failure
        finally:
            response.close()
        events.check_end()

    def upload(self, media: OneMedia) -> api.UploadedMedia:
        """Send a file once; what comes back is given as `media` as often as one likes."""
        return self._answer(calls.upload(media))

    def models(self) -> api.ModelList:
        return self._answer(calls.models())

    def health(self) -> bool:
        """Whether a server runs there at all; no tries after the first."""
        return self._is_ok(_LIVE_PATH)

    def ready(self) -> bool:
        """Whether it answers questions now; no tries after the first."""
        return self._is_ok(_READY_PATH)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, call: Call[Answer]) -> Answer:
        return call.read(self._response(call))

    def _response(self, call: Call[Answer], *, is_streamed: bool = False) -> httpx2.Response:
        n_tries = 0
        while True:
            n_tries += 1
            outcome = self._try(call, is_streamed)
            delay_s = self.connection.retries.delay_s(n_tries, outcome, jitter=random_jitter())
            if delay_s is None:
                break
            _tell_of_wait(outcome, delay_s)
            time.sleep(delay_s)
        if isinstance(outcome, httpx2.TransportError):
            raise self.connection.failure(outcome) from outcome
        return outcome

    def _try(
        self, call: Call[Answer], is_streamed: bool
    ) -> httpx2.Response | httpx2.TransportError:
        try:
            if is_streamed:
                request = self._http.build_request(**call.request_options())
                response = self._http.send(request, stream=True)
                if response.status_code >= 400:
                    response.read()
                return response
            with self._http.stream(**call.request_options()) as response:
                arriving = Arriving(response, limit_s=self.connection.answer_timeout_s)
                for piece in response.iter_bytes():
                    arriving.add(piece)
                return arriving.whole()
        except httpx2.TransportError as failure:
            return failure

    def _is_ok(self, path: str) -> bool:
        try:
            return self._http.get(path).is_success
        except httpx2.TransportError:
            return False


class AsyncClient:
    """As `Client`, awaited. Files are read and arrays compressed on another thread."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        answer_timeout_s: float = 600.0,
        retries: RetryPolicy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.connection: Connection = connection_to(
            url, api_key=api_key, answer_timeout_s=answer_timeout_s, retries=retries
        )
        self._http = httpx2.AsyncClient(transport=transport, **self.connection.httpx_options())
        self.batches = AsyncBatches(self._answer, self._http, self.connection)

    async def point(
        self, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.PointAnswer:
        """Where every `object` ("the red circle") is; several are asked about one by one."""
        return await self._answer(await asyncio.to_thread(calls.point, media, object, options))

    async def count(
        self, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.CountAnswer:
        """How many there are, and where."""
        return await self._answer(await asyncio.to_thread(calls.count, media, object, options))

    async def track(
        self, video: MediaInput, object: What, **options: Unpack[Generation]
    ) -> api.TrackAnswer:
        """Where every `object` is in each frame that the model saw."""
        return await self._answer(await asyncio.to_thread(calls.track, video, object, options))

    async def caption(self, media: MediaInput, **options: Unpack[Generation]) -> api.CaptionAnswer:
        """What is to be seen, in a sentence or two."""
        return await self._answer(await asyncio.to_thread(calls.caption, media, options))

    async def query(
        self, media: MediaInput, question: str, **options: Unpack[Generation]
    ) -> api.QueryAnswer:
        """Any question; places in the answer come as `grounding`."""
        return await self._answer(await asyncio.to_thread(calls.query, media, question, options))

    ask = query

    async def stream(
        self, verb: PointingVerb, media: MediaInput, object: What, **options: Unpack[Generation]
    ) -> AsyncIterator[api.Observation | api.PointingAnswer]:
        """Places as they are written, and at last the answer that the verb's method gives."""
        call = await asyncio.to_thread(calls.streamed, verb, media, object, options)
        events = VerbEvents(call)
        response = await self._response(call, is_streamed=True)
        try:
            if response.status_code >= 400:
                call.read(response)
            async for line in response.aiter_lines():
                for found in events.feed(line):
                    yield found
        except httpx2.TransportError as failure:
            raise self.connection.failure(failure) from failure
        finally:
            await response.aclose()
        events.check_end()

    async def upload(self, media: OneMedia) -> api.UploadedMedia:
        """Send a file once; what comes back is given as `media` as often as one likes."""
        return await self._answer(await asyncio.to_thread(calls.upload, media))

    async def models(self) -> api.ModelList:
        return await self._answer(calls.models())

    async def health(self) -> bool:
        """Whether a server runs there at all; no tries after the first."""
        return await self._is_ok(_LIVE_PATH)

    async def ready(self) -> bool:
        """Whether it answers questions now; no tries after the first."""
        return await self._is_ok(_READY_PATH)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def _answer(self, call: Call[Answer]) -> Answer:
        return call.read(await self._response(call))

    async def _response(self, call: Call[Answer], *, is_streamed: bool = False) -> httpx2.Response:
        n_tries = 0
        while True:
            n_tries += 1
            outcome = await self._try(call, is_streamed)
            delay_s = self.connection.retries.delay_s(n_tries, outcome, jitter=random_jitter())
            if delay_s is None:
                break
            _tell_of_wait(outcome, delay_s)
            await asyncio.sleep(delay_s)
        if isinstance(outcome, httpx2.TransportError):
            raise self.connection.failure(outcome) from outcome
        return outcome

    async def _try(
        self, call: Call[Answer], is_streamed: bool
    ) -> httpx2.Response | httpx2.TransportError:
        try:
            if is_streamed:
                request = self._http.build_request(**call.request_options())
                response = await self._http.send(request, stream=True)
                if response.status_code >= 400:
                    await response.aread()
                return response
            async with self._http.stream(**call.request_options()) as response:
                arriving = Arriving(response, limit_s=self.connection.answer_timeout_s)
                async for piece in response.aiter_bytes():
                    arriving.add(piece)
                return arriving.whole()
        except httpx2.TransportError as failure:
            return failure

    async def _is_ok(self, path: str) -> bool:
        try:
            return (await self._http.get(path)).is_success
        except httpx2.TransportError:
            return False


def _tell_of_wait(outcome: httpx2.Response | httpx2.TransportError, delay_s: float) -> None:
    """A person at a terminal sees why nothing happens: Python shows warnings by itself."""
    if isinstance(outcome, httpx2.Response):
        reason = failure_of(outcome.status_code, outcome.headers, outcome.content).message
    else:
        reason = str(outcome) or type(outcome).__name__
    _LOG.warning("molmo: %s; asking again in %g s", reason, round(delay_s, 2))
