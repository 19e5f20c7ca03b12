"""What tests of batches share: files of requests, waiting for the end."""

from __future__ import annotations

import json
from typing import Any

import orjson

from molmo_core.api_batches import Batch, LineResult
from tests.server.media import data_url, picture
from tests.support.gateway import RunningGateway, until

CHAT, POINT = "/v1/chat/completions", "/v1/point"
PNG = data_url(picture())


def line(custom_id: str, text: str = "Hi", **fields: Any) -> dict[str, Any]:
    """A chat request as a line of a batch; `fields` are the line's own."""
    body = {"messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | fields


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def upload(gateway: RunningGateway, content: bytes, headers: dict[str, str] | None = None) -> str:
    response = gateway.http.post(
        "/v1/files",
        files={"file": ("requests.jsonl", content)},
        data={"purpose": "batch"},
        headers=headers,
    )
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def create(
    gateway: RunningGateway,
    content: bytes,
    endpoint: str = CHAT,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> str:
    file_id = upload(gateway, content, headers)
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **fields}
    response = gateway.http.post("/v1/batches", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def batch_of(
    gateway: RunningGateway, batch_id: str, headers: dict[str, str] | None = None
) -> Batch:
    response = gateway.http.get(f"/v1/batches/{batch_id}", headers=headers)
    assert response.status_code == 200, response.text
    return Batch.model_validate_json(response.content)


def ended(
    gateway: RunningGateway,
    batch_id: str,
    headers: dict[str, str] | None = None,
    limit_s: float = 30,
) -> Batch:
    """The batch when it has ended."""
    until(lambda: batch_of(gateway, batch_id, headers).has_ended, limit_s)
    return batch_of(gateway, batch_id, headers)


def results(
    gateway: RunningGateway, file_id: str | None, headers: dict[str, str] | None = None
) -> list[LineResult]:
    """Of a file of answers, which must be there."""
    response = gateway.http.get(f"/v1/files/{file_id}/content", headers=headers)
    assert response.status_code == 200, response.text
    return [LineResult.model_validate(orjson.loads(one)) for one in response.content.splitlines()]
