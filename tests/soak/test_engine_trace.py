"""One trace from the caller over the gateway to the real engine: vLLM's own span stands in it."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, picture
from tests.support.collector import attributes_of, collecting
from tests.support.gateway import serve_own_engines, until

START_LIMIT_S = 500
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def test_the_engine_s_span_is_under_the_gateway_s(tmp_path: Path) -> None:
    with collecting() as collector:
        settings = MolmoSettings(
            dtype="float32",
            n_threads=1,
            start_timeout_s=START_LIMIT_S,
            otlp_endpoint=collector.url,
        )
        with (
            serve_own_engines(settings, tmp_path) as (url, _),
            httpx2.Client(base_url=url, timeout=300) as http,
        ):
            body = {"image_url": data_url(picture()), "object": "the red circle"}
            answer = http.post("/v1/point", json=body, headers={"traceparent": CALLER})
            assert answer.status_code == 200, answer.text
            until(lambda: bool(_of_caller(collector.named("llm_request"))))
        [request] = collector.named("POST /v1/point")
        [asking] = [s for s in collector.named("engine") if s.parent_span_id == request.span_id]
        [computing] = _of_caller(collector.named("llm_request"))
        whose = dict(zip((s.span_id for s in collector.spans), collector.services, strict=True))

    assert request.parent_span_id.hex() == CALLER[36:52]
    assert computing.parent_span_id == asking.span_id
    assert whose[computing.span_id] == "molmo-engine"
    assert whose[asking.span_id] == "molmo-gateway"
    n_tokens = attributes_of(computing)["gen_ai.usage.completion_tokens"]
    assert n_tokens == attributes_of(asking)["molmo.n_completion_tokens"]
    assert "red circle" not in str(collector.spans)


def _of_caller(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.trace_id.hex() == CALLER[3:35]]
