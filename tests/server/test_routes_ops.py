"""Models, health, readiness, metrics and the description of the service."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from molmo_server.web.docs_page import docs_page
from tests.server.media import data_url, picture
from tests.support.gateway import RunningGateway, error_of, running_gateway, until

PNG = data_url(picture())


def sample(gateway: RunningGateway, name: str) -> float:
    """One sample of the metrics; 0 when it is not there yet."""
    text = gateway.http.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_models(gateway: RunningGateway) -> None:
    listed = gateway.http.get("/v1/models").json()
    checkpoint = gateway.http.get("/health").json()["checkpoint"]

    assert listed["object"] == "list"
    [card] = listed["data"]
    assert card["id"] == "molmo2"
    assert card["max_model_len"] == 4096
    assert card["checkpoint"] == checkpoint
    assert gateway.http.get("/v1/models/molmo2").json() == card
    assert gateway.http.get(f"/v1/models/{checkpoint}").json() == card
    missing = gateway.http.get("/v1/models/gpt-4")
    assert (missing.status_code, error_of(missing)["param"]) == (404, "model")


def test_the_checkpoint_can_be_asked_for_by_its_id(gateway: RunningGateway) -> None:
    checkpoint = gateway.http.get("/health").json()["checkpoint"]

    answer = gateway.chat("Hi", model=checkpoint)

    assert answer.status_code == 200
    assert gateway.engine.requests[0]["model"] == "molmo2"


def test_readiness_follows_the_engine_and_liveness_does_not(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path) as gateway:
        assert gateway.http.get("/ready").json()["status"] == "ready"

        gateway.engine.is_healthy = False
        until(lambda: not gateway.is_ready())
        refused = gateway.http.get("/ready")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "engine-0 is" in error_of(refused)["message"]
        assert gateway.http.get("/health").status_code == 200

        gateway.engine.is_healthy = True
        until(gateway.is_ready)


def test_metrics_count_requests_and_points(gateway: RunningGateway) -> None:
    names = {
        "point": 'molmo_requests_total{route="/v1/point",status="200"}',
        "chat": 'molmo_requests_total{route="/v1/chat/completions",status="200"}',
        "refused": 'molmo_requests_total{route="/v1/point",status="400"}',
        "seconds": 'molmo_request_seconds_count{route="/v1/point"}',
        "points": 'molmo_observations_total{kind="point"}',
    }
    before = {key: sample(gateway, name) for key, name in names.items()}

    gateway.http.post("/v1/point", json={"image_url": PNG, "object": "x"})
    gateway.http.post("/v1/point", json={"object": "x"})
    gateway.stream_bytes("Hi")

    after = {key: sample(gateway, name) for key, name in names.items()}
    gained = {key: after[key] - before[key] for key in names}
    assert gained == {"point": 1, "chat": 1, "refused": 1, "seconds": 2, "points": 1}


def test_metrics_show_the_engine(gateway: RunningGateway) -> None:
    text = gateway.http.get("/metrics").text

    assert sample(gateway, 'molmo_engine_ready{engine="engine-0"}') == 1
    assert sample(gateway, 'molmo_engine_restarts{engine="engine-0"}') == 0
    assert sample(gateway, "molmo_running") == 0
    assert 'vllm:num_requests_running{gateway_engine="engine-0"} 0' in text
    assert "process_open_fds" not in text


def test_callers_cannot_name_metrics(gateway: RunningGateway) -> None:
    for path in ("/made-up", "/v1/models/made-up", "/v1/point/made-up"):
        gateway.http.get(path, headers={"x-request-id": "made-up"})

    assert "made-up" not in gateway.http.get("/metrics").text


def test_the_id_of_a_caller_is_not_taken_over(gateway: RunningGateway) -> None:
    response = gateway.http.get("/health", headers={"x-request-id": "made-up"})

    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_the_documents_describe_every_route(gateway: RunningGateway) -> None:
    document = gateway.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    operations = {o["operationId"] for path in document["paths"].values() for o in path.values()}
    verbs = {"point", "count", "track", "caption", "query"}
    operating = {"models", "model", "health", "ready", "metrics"}
    admin = {"checkpoints", "activate", "rollback", "usage"}
    admin |= {"engines", "register_engine", "remove_engine", "drain_engine", "restart_engine"}
    media = {"upload", "media", "delete_media"}
    openai = {"chat", "completions", "responses"}
    files = {"files", "create_file", "file", "file_content", "delete_file"}
    batches = {"batches", "create_batch", "batch", "cancel_batch"}
    assert operations == verbs | operating | admin | media | files | batches | openai
    for name in references(document):
        assert name.removeprefix("#/components/schemas/") in schemas
    assert set(schemas["TrackRequest"]["required"]) == {"video_url"}
    for verb in ("point", "count", "track"):
        content = document["paths"][f"/v1/{verb}"]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
    assert set(schemas["QueryRequest"]["required"]) == {"question"}


class _Read(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attributes if name == "id"]
        self.links += [str(value) for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_documents_needs_nothing_else(gateway: RunningGateway) -> None:
    page, document = gateway.http.get("/docs"), gateway.http.get("/openapi.json").json()

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    read = _Read(page.text)
    assert read.open == []
    assert not {"script", "link", "img", "iframe", "form"} & set(read.tags)
    assert {link for link in read.links if not link.startswith("#")} == {"/openapi.json"}
    assert set(read.ids) == set(document["components"]["schemas"])
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)
    n_operations = sum(len(operations) for operations in document["paths"].values())
    assert read.tags.count("details") == n_operations + len(read.ids)
    style = page.text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.headers["content-security-policy"].split("; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert {"default-src 'none'", "frame-ancestors 'none'"} < set(policy)


def test_words_of_the_document_are_only_words_on_the_page() -> None:
    evil = "<script>alert(1)</script>"
    operation = {"summary": evil, "responses": {"200": {"description": evil}}, "tags": [evil]}
    document = {
        "info": {"title": evil, "version": evil},
        "paths": {f"/{evil}": {"get": operation}},
        "components": {
            "schemas": {evil: {"properties": {evil: {"enum": [evil], "default": evil}}}}
        },
    }
    assert "<script>" not in docs_page(document)


def references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(references, node.values()))
