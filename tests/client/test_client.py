"""Both clients against a real gateway, and against servers that fail."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from molmo_client import (
    AnswerTimedOut,
    AsyncClient,
    Client,
    RequestFailed,
    RetryPolicy,
    ServerUnreachable,
    WrongUsage,
)
from molmo_core import api, errors
from tests.server import media
from tests.support.gateway import RunningGateway

AT_ONCE = RetryPolicy(n_retries=2, first_delay_s=0.0)
PICTURE = media.picture()
Ask = Callable[..., Any]


@pytest.fixture(params=["waiting", "awaited"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """`ask(method, *arguments, url=…, **options of the client)` with either client."""

    def waiting(method: str, *arguments: Any, asked: dict[str, Any] | None = None, **options: Any):
        with Client(**options) as client:
            return getattr(client, method)(*arguments, **(asked or {}))

    def awaited(method: str, *arguments: Any, asked: dict[str, Any] | None = None, **options: Any):
        async def once() -> Any:
            async with AsyncClient(**options) as client:
                return await getattr(client, method)(*arguments, **(asked or {}))

        return asyncio.run(once())

    return waiting if request.param == "waiting" else awaited


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)
    assert set(public(Client)) >= {"point", "count", "track", "caption", "query", "ask", "models"}


def test_points(ask: Ask, gateway: RunningGateway) -> None:
    gateway.engine.script["dots"] = '<points coords="1 1 250 500;2 2 750 100">dots</points>'
    answer = ask("point", [PICTURE, PICTURE], "dots", url=gateway.url)
    assert [(p.media_index, p.x, p.y, p.label) for p in answer.points] == [
        (0, 0.25, 0.5, "dots"),
        (1, 0.75, 0.1, "dots"),
    ]
    assert (answer.count, answer.found) == (2, True)
    assert answer.points[0].pixel.x == 16.0  # of 64
    assert answer.checkpoint.startswith("small@")


def test_every_kind_of_picture(ask: Ask, gateway: RunningGateway, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    array = np.zeros((48, 64, 3), dtype=np.uint8)
    url = media.data_url(PICTURE)
    for one in (path, str(path), PICTURE, path.open("rb"), Image.fromarray(array), array, url):
        answer = ask("count", one, "dots", url=gateway.url)
        assert (answer.media[0].width, answer.media[0].height) == (64, 48)
        assert answer.count == 1
        if hasattr(one, "close"):
            one.close()


def test_tracks(ask: Ask, gateway: RunningGateway) -> None:
    text = '<tracks coords="0.0 1 500 500;0.5 1 600 500 2 100 200">ball</tracks>'
    gateway.engine.script["ball"] = text
    answer = ask("track", media.video(), "ball", url=gateway.url)
    assert [(t.id, [(p.t, p.x) for p in t.points]) for t in answer.tracks] == [
        (1, [(0.0, 0.5), (0.5, 0.6)]),
        (2, [(0.5, 0.1)]),
    ]
    assert answer.frames[0].time == 0.0


@pytest.fixture(params=["waiting", "awaited"])
def stream(request: pytest.FixtureRequest) -> Ask:
    """`stream(verb, media, object, url=…, **options)` with either client: all that it yields."""

    def waiting(*arguments: Any, url: str, **options: Any) -> list[Any]:
        with Client(url, retries=AT_ONCE) as client:
            return list(client.stream(*arguments, **options))

    def awaited(*arguments: Any, url: str, **options: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            async with AsyncClient(url, retries=AT_ONCE) as client:
                return [found async for found in client.stream(*arguments, **options)]

        return asyncio.run(all_of_them())

    return waiting if request.param == "waiting" else awaited


def test_places_as_they_are_written(stream: Ask, gateway: RunningGateway) -> None:
    gateway.engine.script["dots"] = '<points coords="1 1 250 500 2 750 100">dots</points>'
    *places, answer = stream("point", PICTURE, "dots", url=gateway.url, confidence=True)
    assert [(type(p), p.id, p.x) for p in places] == [
        (api.Observation, 1, 0.25),
        (api.Observation, 2, 0.75),
    ]
    assert isinstance(answer, api.PointAnswer)
    assert [p.confidence for p in answer.points] == [p.confidence for p in places]
    assert None not in [p.confidence for p in places]


def test_streams_of_the_other_verbs(stream: Ask, gateway: RunningGateway) -> None:
    gateway.engine.script["dots"] = "There are none."
    [counted] = stream("count", PICTURE, ["dots", "dots"], url=gateway.url)
    assert isinstance(counted, api.CountAnswer)
    assert [one.status for one in counted.objects or []] == ["none", "none"]
    gateway.engine.script["ball"] = '<tracks coords="0.0 1 500 500">ball</tracks>'
    place, tracked = stream("track", media.video(), "ball", url=gateway.url)
    assert isinstance(tracked, api.TrackAnswer)
    assert (place.kind, place.t, tracked.count) == ("track", 0.0, 1)


def test_a_stream_that_fails(stream: Ask, gateway: RunningGateway) -> None:
    with pytest.raises(errors.EngineFailed) as refused:
        stream("point", PICTURE, "dots [500]", url=gateway.url)
    assert refused.value.status == 502
    with pytest.raises(errors.EngineFailed):
        stream("point", PICTURE, "dots [error event]", url=gateway.url)
    with pytest.raises(errors.InvalidRequest, match="max_points"):
        stream("point", PICTURE, "dots", url=gateway.url, max_points=0)


def test_options_of_places_reach_the_engine(ask: Ask, gateway: RunningGateway) -> None:
    region = {"x0": 0.5, "y0": 0.5, "x1": 1, "y1": 1}
    asked = {"region": region, "constrained": False, "max_points": 1}
    answer = ask("point", PICTURE, ["a", "b"], url=gateway.url, asked=asked)
    assert [one.object for one in answer.objects] == ["a", "b"]
    assert (answer.points[0].x, answer.points[0].y) == (0.625, 0.75)
    point = {"t": 0.5, "x": 0.1, "y": 0.2}
    asked = {"points": [point], "frame_rate": 2, "interpolate": True}
    ask("track", media.video(), "ball", url=gateway.url, asked=asked)
    question = gateway.engine.requests[-1]["messages"][0]["content"][-1]["text"]
    assert '<points coords="0.5 1 100 200">ball</points> in 2 FPS.' in question


def test_uploads(ask: Ask, gateway: RunningGateway) -> None:
    clip = media.video(n_frames=10)
    picture, video = (ask("upload", sent, url=gateway.url) for sent in (PICTURE, clip))
    assert (picture.type, picture.width, video.type, video.fps) == ("image", 64, "video", 25.0)
    assert ask("upload", media.data_url(PICTURE), url=gateway.url).id == picture.id
    for given, kind in ((picture, "image"), (picture.url, "image"), (video, "video")):
        assert ask("point", given, "dots", url=gateway.url).media[0].type == kind
    assert len(ask("count", [picture, PICTURE], "dots", url=gateway.url).media) == 2
    for given in (video, video.url):
        assert ask("track", given, "ball", url=gateway.url).media[0].width == 64
    with pytest.raises(errors.MediaNotFound, match="upload it with POST") as caught:
        ask("point", "media://media-0", "dots", url=gateway.url)
    assert caught.value.status == 404
    with pytest.raises(errors.InvalidMedia, match="is not at hand; give a path"):
        ask("upload", picture, url=gateway.url)


def test_words(ask: Ask, gateway: RunningGateway) -> None:
    gateway.engine.script["?"] = "Blue."
    gateway.engine.script[""] = "A grey field."
    assert ask("query", PICTURE, "Which colour?", url=gateway.url).answer == "Blue."
    assert ask("ask", PICTURE, "Which colour?", url=gateway.url).grounding.points == []
    assert ask("caption", PICTURE, url=gateway.url).caption == "A grey field."
    assert ask("models", url=gateway.url).data[0].checkpoint.startswith("small@")


def test_options_reach_the_engine(ask: Ask, gateway: RunningGateway) -> None:
    asked = {"max_tokens": 3, "temperature": 0.5, "seed": 7}
    answer = ask("caption", PICTURE, url=gateway.url, asked=asked)
    assert answer.finish_reason == "length"
    body = gateway.engine.requests[-1]
    assert {name: body[name] for name in asked} == asked


def test_liveness(ask: Ask, gateway: RunningGateway) -> None:
    assert ask("health", url=gateway.url) is True
    assert ask("ready", url=gateway.url) is True
    assert ask("health", url="http://127.0.0.1:9") is False


@pytest.mark.parametrize(
    ("media_sent", "what", "leaf", "message"),
    [
        (PICTURE, "<im_end>", errors.ControlTokenInText, "control token"),
        ([PICTURE] * 5, "dots", errors.TooManyMedia, "got 5 images, allowed are 4"),
        (PICTURE[:100], "dots", errors.InvalidMedia, "damaged or cut short"),
        (PICTURE, "[400]", errors.EngineRefused, "engine"),
    ],
)
def test_refusals_are_typed(
    ask: Ask, gateway: RunningGateway, media_sent: Any, what: str, leaf: type, message: str
) -> None:
    with pytest.raises(RequestFailed, match=message) as caught:
        ask("point", media_sent, what, url=gateway.url)
    assert isinstance(caught.value, leaf)
    assert caught.value.request_id


def test_bad_arguments_are_found_before_sending(ask: Ask, gateway: RunningGateway) -> None:
    for method, arguments, asked, message in (
        ("point", (PICTURE, ""), {}, "object: String should have at least 1 character"),
        ("track", (PICTURE, "ball"), {}, "tracking takes one video"),
        ("point", ([media.video(), PICTURE], "x"), {}, "1 pictures and 1 videos"),
        ("caption", (PICTURE,), {"temperatur": 1}, "did you mean temperature"),
        ("caption", ([],), {}, "0 pictures"),
    ):
        with pytest.raises(errors.InvalidRequest, match=message) as caught:
            ask(method, *arguments, url=gateway.url, asked=asked)
        assert not isinstance(caught.value, RequestFailed)
    assert gateway.engine.requests == []


# --- retries ----------------------------------------------------------------------------------


class Failing:
    """A transport for both clients: the given outcomes, then the last one for ever."""

    def __init__(self, *outcomes: httpx2.Response | Exception) -> None:
        self._outcomes = list(outcomes)
        self.n_tries = 0
        self.transport = httpx2.MockTransport(self._answer)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        outcome = self._outcomes[min(self.n_tries, len(self._outcomes) - 1)]
        self.n_tries += 1
        if isinstance(outcome, Exception):
            raise outcome
        return httpx2.Response(
            outcome.status_code, headers=outcome.headers, content=outcome.content
        )


def refusal(status: int, code: str, message: str = "not now", **headers: str) -> httpx2.Response:
    body = {"error": {"message": message, "type": "t", "param": None, "code": code}}
    return httpx2.Response(status, json=body, headers=headers)


GOOD = httpx2.Response(200, json={"object": "list", "data": []})


def test_a_busy_server_is_asked_again_when_it_says(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    busy = refusal(503, "busy", "the queue is full", **{"retry-after": "0.25"})
    server = Failing(busy, busy, GOOD)
    began_s = time.monotonic()
    assert ask("models", url="http://x", transport=server.transport).data == []
    assert time.monotonic() - began_s >= 0.5
    assert server.n_tries == 3
    told = [message for message in caplog.messages if message.startswith("molmo: ")]
    assert told == ["molmo: the queue is full; asking again in 0.25 s"] * 2


def test_a_server_that_stays_busy_is_told_as_such(ask: Ask) -> None:
    headers = {"retry-after": "0.01", "x-request-id": "abc"}
    server = Failing(refusal(503, "engine_unavailable", "starting", **headers))
    with pytest.raises(errors.EngineUnavailable, match="starting") as caught:
        ask("models", url="http://x", transport=server.transport)
    assert server.n_tries == 3
    assert (caught.value.retry_after_s, caught.value.status) == (0.01, 503)
    assert isinstance(caught.value, RequestFailed)
    assert caught.value.request_id == "abc"


def test_a_refusal_is_not_asked_again(ask: Ask) -> None:
    server = Failing(refusal(400, "invalid_media"))
    with pytest.raises(errors.InvalidMedia):
        ask("models", url="http://x", transport=server.transport)
    assert server.n_tries == 1


def test_a_lost_connection_is_tried_again(ask: Ask) -> None:
    server = Failing(httpx2.ConnectError("refused"), httpx2.RemoteProtocolError("cut"), GOOD)
    assert ask("models", url="http://x", transport=server.transport, retries=AT_ONCE).data == []
    assert server.n_tries == 3


def test_nobody_there(ask: Ask) -> None:
    with pytest.raises(
        ServerUnreachable, match=r"http://127.0.0.1:9 .*start it with `molmo serve`"
    ):
        ask("models", url="http://127.0.0.1:9", retries=AT_ONCE)


def test_something_else_than_a_molmo_server(ask: Ask) -> None:
    server = Failing(httpx2.Response(200, content=b"<html>"))
    with pytest.raises(RequestFailed, match="check that the address is a Molmo server"):
        ask("models", url="http://x", transport=server.transport)
    server = Failing(httpx2.Response(404, content=b"<html>nothing here"))
    with pytest.raises(errors.NotFound, match="<html>nothing here"):
        ask("models", url="http://x", transport=server.transport)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes requests and never answers."""
    ended = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ended.wait()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_answer_that_never_comes(ask: Ask, silent_server: str) -> None:
    with pytest.raises(AnswerTimedOut, match=r"did not answer within 0\.2 s"):
        ask("models", url=silent_server, answer_timeout_s=0.2, retries=AT_ONCE)


# --- addresses --------------------------------------------------------------------------------


def test_where_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLMO_SERVER", raising=False)
    with Client() as client:
        assert client.connection.url == "http://127.0.0.1:8000"
    monkeypatch.setenv("MOLMO_SERVER", "http://box:9000/v1/")
    with Client() as client:
        assert client.connection.url == "http://box:9000"
    with Client("https://other") as client:
        assert client.connection.url == "https://other"


@pytest.mark.parametrize("address", ["box:8000", "ftp://box", "http://", "http://box:port"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(WrongUsage, match="http://HOST:PORT"):
        Client(address)


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("authorization"))
        return httpx2.Response(200, json={"object": "list", "data": []})

    monkeypatch.setenv("MOLMO_API_KEY", "sesame")
    with Client("http://x", transport=httpx2.MockTransport(answer)) as client:
        client.models()
        assert "sesame" not in repr(client.connection)
    assert seen == ["Bearer sesame"]
