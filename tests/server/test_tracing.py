"""A request's trace, from the caller's span over the gateway's to what the engine is sent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider

from molmo_client import Client
from molmo_server.engine_pool.fake import FakeEngine, Trick
from tests.server.media import image_part, picture, text_part
from tests.support.collector import attributes_of, collecting
from tests.support.gateway import running_gateway

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_one_trace_from_the_caller_to_the_engine(folder: Path, tmp_path: Path) -> None:
    with collecting() as collector:
        with running_gateway(folder, tmp_path, otlp_endpoint=collector.url) as gateway:
            gateway.http.headers["traceparent"] = CALLER
            gateway.http.headers["tracestate"] = "hidden=words"
            gateway.stream_bytes([image_part(picture()), text_part("a secret question")])
            sent = gateway.engine.traceparents
        request = collector.one("POST /v1/chat/completions")
        steps = ["queue", "media", "routing", "prompt", "engine"]
        spans = {name: collector.one(name) for name in steps}

    assert {span.trace_id.hex() for span in collector.spans} == {CALLER[3:35]}
    assert request.parent_span_id.hex() == CALLER[36:52]
    assert {span.parent_span_id for span in spans.values()} == {request.span_id}
    assert sent == [f"00-{CALLER[3:35]}-{spans['engine'].span_id.hex()}-01"]
    starts = [spans[name].start_time_unix_nano for name in steps]
    assert starts == sorted(starts)
    assert [event.name for event in spans["engine"].events] == ["first token"]
    assert set(collector.services) == {"molmo-gateway"}
    told = attributes_of(request)
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/chat/completions", 200)
    assert attributes_of(spans["media"]) == {"molmo.n_images": 1, "molmo.n_videos": 0}
    engine = attributes_of(spans["engine"])
    assert engine["molmo.engine"] == "engine-0"
    assert engine["molmo.n_prompt_tokens"] == 3  # as the scripted engine tells
    assert engine["molmo.n_visual_tokens"] == 12
    everything = str(collector.spans)
    assert [word for word in ("secret", "hidden", "base64") if word in everything] == []


def test_a_request_that_breaks_is_seen_with_both_tries(folder: Path, tmp_path: Path) -> None:
    with collecting() as collector:
        with running_gateway(folder, tmp_path, otlp_endpoint=collector.url) as gateway:
            assert gateway.chat(str(Trick.BREAK_FIRST)).status_code == 200
            assert gateway.chat("x", temperatur=1).status_code == 400
            parents = gateway.engine.traceparents
        ids = [span.span_id.hex() for span in collector.named("engine")]
        sent = collector.named("POST /v1/chat/completions")
        requests = sorted(sent, key=lambda span: span.start_time_unix_nano)

    assert [str(parent)[36:52] for parent in parents] == ids
    assert len(set(ids)) == 2
    codes = [attributes_of(request).get("error.type") for request in requests]
    assert codes == [None, "unknown_parameter"]
    assert len({request.trace_id for request in requests}) == 2


def test_the_client_sends_the_trace_it_is_called_in(folder: Path, tmp_path: Path) -> None:
    tracer = TracerProvider().get_tracer("a caller")
    with collecting() as collector:
        with (
            running_gateway(folder, tmp_path, otlp_endpoint=collector.url) as gateway,
            Client(gateway.url) as client,
        ):
            with tracer.start_as_current_span("asks") as span:
                client.point(picture(), "the red circle")
            client.caption(picture())
        inside, outside = collector.one("POST /v1/point"), collector.one("POST /v1/caption")

    context = span.get_span_context()
    assert int.from_bytes(inside.trace_id) == context.trace_id
    assert int.from_bytes(inside.parent_span_id) == context.span_id
    assert outside.parent_span_id == b""


def test_without_an_endpoint_there_is_no_trace_and_no_import(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_gateway(folder, tmp_path, engine) as gateway:
        gateway.chat("Hi")
        assert gateway.http.get("/health", headers={"traceparent": CALLER}).status_code == 200
    assert engine.traceparents == [None]

    code = (
        "import sys; import molmo_server.serve; from molmo_server.telemetry import Tracing;"
        "Tracing(None).close(); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answers_come_also_when_the_collector_is_away(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path, otlp_endpoint="http://127.0.0.1:9") as gateway:
        assert gateway.chat("Hi").status_code == 200
        (traceparent,) = gateway.engine.traceparents
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", str(traceparent))
