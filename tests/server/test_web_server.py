"""What the web server does beside the application: heads, places, headers for browsers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.support.gateway import RunningGateway, events_of, running_gateway

ORIGIN = {"origin": "https://app.example.org"}


@pytest.fixture(scope="module")
def narrow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """One that is impatient, with few places; a page of another origin may ask it."""
    with running_gateway(
        folder,
        tmp_path_factory.mktemp("sockets"),
        head_timeout_s=0.3,
        keep_alive_s=0.3,
        max_connections=4,
        cors_origins=ORIGIN["origin"],
    ) as gateway:
        yield gateway


def opened(gateway: RunningGateway) -> socket.socket:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def said_to(gateway: RunningGateway, *pieces: bytes) -> tuple[int, bytes]:
    """(status, body) of what is answered before the server closes."""
    with opened(gateway) as caller:
        said = b""
        for piece in pieces:
            caller.sendall(piece)
        while piece := caller.recv(65536):
            said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def test_a_head_that_does_not_end_is_cut(narrow: RunningGateway) -> None:
    status, body = said_to(narrow, b"GET /health HTTP/1.1\r\nx-header: ")
    assert status == 408
    error = orjson.loads(body)["error"]
    assert "the head of the request was not complete after 0.3 s" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_connection_without_a_request_is_closed(narrow: RunningGateway) -> None:
    assert said_to(narrow) == (0, b"")


def test_a_second_head_has_its_time_too(narrow: RunningGateway) -> None:
    whole = b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
    with opened(narrow) as caller:
        caller.sendall(whole)
        assert caller.recv(65536).startswith(b"HTTP/1.1 200 ")
        caller.sendall(whole[:10])
        said = b""
        while piece := caller.recv(65536):
            said += piece
    assert b"HTTP/1.1 408 " in said  # what is left of the first answer may come before it


def test_a_head_too_large_is_refused(narrow: RunningGateway) -> None:
    status, body = said_to(narrow, b"GET /health HTTP/1.1\r\nx-header: " + b"x" * 70_000)
    assert status == 431
    assert b"the head of the request has more than 65,536 bytes" in body


def test_what_is_no_http_is_refused_in_the_envelope(narrow: RunningGateway) -> None:
    status, body = said_to(narrow, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert status == 400
    assert orjson.loads(body)["error"]["code"] == "invalid_request"


def test_a_long_answer_needs_no_haste(narrow: RunningGateway) -> None:
    """The times for heads do not run while an answer is given."""
    assert events_of(narrow.stream_bytes("[slow]"))[-1]["choices"][0]["delta"]["grounding"]


def test_too_many_connections(narrow: RunningGateway) -> None:
    said = []
    callers = [opened(narrow) for _ in range(8)]
    for caller in callers:
        with caller:
            said.append(caller.recv(65536))
    refused = [one for one in said if one.startswith(b"HTTP/1.1 503 ")]
    assert 4 <= len(refused) <= 5  # the client of the tests may have a place
    assert orjson.loads(refused[0].partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    assert said.count(b"") == 8 - len(refused)
    assert narrow.http.get("/health").status_code == 200


def test_every_answer_has_headers_for_browsers(gateway: RunningGateway) -> None:
    answers = [
        gateway.http.get("/health"),
        gateway.http.get("/nothing/here"),
        gateway.http.get("/openapi.json"),
        gateway.http.post("/v1/point", content=b"no JSON"),
        gateway.chat("Hi"),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; frame-ancestors 'none'")
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    stream = gateway.chat("Hi", stream=True)
    assert stream.headers.get_list("cache-control") == ["no-cache"]
    assert stream.headers["x-content-type-options"] == "nosniff"


def test_foreign_pages_may_not_ask(gateway: RunningGateway) -> None:
    asked = {**ORIGIN, "access-control-request-method": "POST"}
    preflight = gateway.http.options("/v1/point", headers=asked)
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


def test_pages_of_an_allowed_origin_may(narrow: RunningGateway) -> None:
    wanted = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = narrow.http.options("/v1/point", headers={**ORIGIN, **wanted})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in preflight.headers

    answer = narrow.http.get("/v1/models", headers=ORIGIN)
    assert answer.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = narrow.http.options("/v1/point", headers={"origin": "https://evil.example", **wanted})
    assert "access-control-allow-origin" not in other.headers
