"""An engine that breaks, hangs or is full: every caller gets an answer, and soon."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.engine_pool.fake import DEFAULT_ANSWER, FakeEngine, Trick
from tests.support.gateway import RunningGateway, error_of, events_of, running_gateway, until


def test_a_request_that_breaks_before_its_first_byte_is_sent_again(
    gateway: RunningGateway,
) -> None:
    for is_stream in (False, True):
        question = f"{Trick.BREAK_FIRST} {is_stream}"
        gateway.engine.requests.clear()
        if is_stream:
            pieces = events_of(gateway.stream_bytes(question))[:-1]
            text = "".join(e["choices"][0]["delta"].get("content", "") for e in pieces)
        else:
            text = gateway.chat(question).json()["choices"][0]["message"]["content"]

        assert text == DEFAULT_ANSWER
        assert len(gateway.engine.requests) == 2


@pytest.mark.parametrize(
    ("trick", "status", "code", "n_asked"),
    [
        (Trick.FAIL, 502, "engine_failed", 2),
        (Trick.REFUSE, 400, "engine_refused", 1),
        (Trick.FULL, 503, "engine_unavailable", 2),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_the_engine_answers_is_mapped(
    gateway: RunningGateway, trick: Trick, status: int, code: str, n_asked: int, is_stream: bool
) -> None:
    response = gateway.chat(str(trick), stream=is_stream)

    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert ("retry-after" in response.headers) is (status == 503)
    # Addresses of memory are of use to nobody but an attacker.
    assert "0x7f00deadbeef" not in error["message"]
    assert len(gateway.engine.requests) == n_asked
    until(gateway.is_ready)


@pytest.mark.parametrize(
    ("trick", "code"), [(Trick.BREAK, "engine_unavailable"), (Trick.ERROR_EVENT, "engine_failed")]
)
def test_a_stream_that_breaks_ends_with_an_error_event(
    gateway: RunningGateway, trick: Trick, code: str
) -> None:
    events = events_of(gateway.stream_bytes(str(trick)))

    assert events[-1]["error"]["code"] == code
    assert "send it again" in events[-1]["error"]["message"].replace("the request", "it")
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert 0 < len(text) < len(DEFAULT_ANSWER)
    assert DEFAULT_ANSWER.startswith(text)
    until(gateway.is_ready)


def test_an_answer_that_takes_too_long(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path, deadline_s=0.3) as gateway:
        began = time.monotonic()
        response = gateway.chat(str(Trick.HANG))

        assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began < 10
        until(lambda: gateway.engine.n_dropped == 1)


def test_a_stream_that_takes_too_long(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine(seconds_per_piece=0.1)
    with running_gateway(folder, tmp_path, engine, deadline_s=0.5) as gateway:
        events = events_of(gateway.stream_bytes("Hi"))

        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert 1 < len(events) < 10


def test_a_full_queue_is_refused_and_the_others_are_served(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine(seconds_per_piece=0.02)
    limits = {"max_concurrent": 1, "max_queued": 1}
    with running_gateway(folder, tmp_path, engine, **limits) as gateway:
        responses: list[httpx2.Response] = []

        def ask() -> None:
            responses.append(gateway.chat("Hi"))

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=30)

        assert sorted(r.status_code for r in responses) == [200, 200, 503, 503]
        for refused in (r for r in responses if r.status_code == 503):
            assert error_of(refused)["code"] == "busy"
            assert refused.headers["retry-after"] == "2"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_caller_who_leaves_ends_the_engines_work(
    folder: Path, tmp_path: Path, is_stream: bool
) -> None:
    engine = FakeEngine(seconds_per_piece=0.05, default="word " * 400)
    question: Any = "Hi" if is_stream else str(Trick.HANG)
    body = {"messages": [{"role": "user", "content": question}], "stream": is_stream}
    with running_gateway(folder, tmp_path, engine) as gateway:

        async def ask_and_leave() -> None:
            async with httpx2.AsyncClient(base_url=gateway.url) as http:
                asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
                while not engine.requests:
                    await asyncio.sleep(0.01)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        asyncio.run(ask_and_leave())

        until(lambda: engine.n_dropped == 1)
        until(lambda: 'status="499"} 1.0' in gateway.http.get("/metrics").text)
        assert "molmo_running 0.0" in gateway.http.get("/metrics").text


def test_without_an_engine_callers_are_told_at_once(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path) as gateway:
        gateway.engine.is_healthy = False
        until(lambda: "starting" in gateway.http.get("/ready").text)

        began = time.monotonic()
        responses = [gateway.chat("Hi", stream=is_stream) for is_stream in (False, True)]

        assert [r.status_code for r in responses] == [503, 503]
        assert {error_of(r)["code"] for r in responses} == {"engine_unavailable"}
        assert all(int(r.headers["retry-after"]) >= 1 for r in responses)
        assert time.monotonic() - began < 5
        assert gateway.engine.requests == []
