"""`/v1/batches`: lines in, lines out, whatever happens on the way."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from molmo_core.api_batches import Batch
from molmo_core.errors import BatchStoreError
from molmo_server.batches.jobs import JobStore
from molmo_server.engine_pool.fake import DEFAULT_ANSWER, FakeEngine, Trick, question_of
from molmo_server.tenancy.store import KeyStore, KeyUsage
from tests.server.batches import (
    CHAT,
    PNG,
    POINT,
    batch_of,
    create,
    ended,
    jsonl,
    line,
    results,
    upload,
)
from tests.server.media import picture
from tests.server.test_routes_ops import sample
from tests.support.gateway import RunningGateway, error_of, running_gateway, until


def text_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


def test_lines_in_lines_out(gateway: RunningGateway) -> None:
    gateway.engine.script.update({f"number {k}.": f"answer {k}" for k in range(20)})
    before = sample(gateway, 'molmo_batch_lines_total{status="completed"}')
    batch_id = create(
        gateway,
        jsonl([line(f"line-{k}", f"number {k}.") for k in range(20)]),
        metadata={"of": "tests"},
    )

    batch = ended(gateway, batch_id)

    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    assert (batch.endpoint, batch.metadata) == (CHAT, {"of": "tests"})
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.expires_at - batch.created_at == 24 * 3600
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0)
    found = results(gateway, batch.output_file_id)
    assert [one.custom_id for one in found] == [f"line-{k}" for k in range(20)]
    for k, one in enumerate(found):
        assert one.error is None
        assert one.response is not None
        assert one.response.status_code == 200
        assert text_of(one.response.body) == f"answer {k}"
        assert one.response.body["choices"][0]["message"]["grounding"]["points"] == []
    requests = {one.response.request_id for one in found if one.response}
    assert len(requests | {one.id for one in found}) == 40
    assert sample(gateway, 'molmo_batch_lines_total{status="completed"}') == before + 20
    assert sample(gateway, "molmo_batches") == 0


def test_the_official_client(gateway: RunningGateway) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    with client:
        file = client.files.create(
            file=("requests.jsonl", jsonl([line("a")])),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 7200},
        )
        assert file.expires_at == file.created_at + 7200
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            metadata={"name": "first"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert batch.status == "validating"
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 1
        assert batch.output_file_id is not None
        output = client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        assert output.expires_at == output.created_at + 3600
        assert b'"custom_id":"a"' in client.files.content(batch.output_file_id).read()
        assert batch.id in [one.id for one in client.batches.list(limit=1)]
        with pytest.raises(openai.BadRequestError, match="only one that has not ended"):
            client.batches.cancel(batch.id)
        assert {file.id, output.id} <= {one.id for one in client.files.list()}
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_verbs(gateway: RunningGateway) -> None:
    good = {"image_url": PNG, "object": "red circle"}
    lines = [
        line("good", url=POINT, body=good),
        line("no-object", url=POINT, body={"image_url": PNG}),
        line("strange", url=POINT, body={**good, "objekt": "x"}),
    ]

    batch = ended(gateway, create(gateway, jsonl(lines), POINT))

    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 3, "completed": 1, "failed": 2}
    [answer] = results(gateway, batch.output_file_id)
    assert answer.response is not None
    assert answer.response.body["count"] == 1
    refused = results(gateway, batch.error_file_id)
    assert [one.custom_id for one in refused] == ["no-object", "strange"]
    codes = [one.response and one.response.body["error"]["code"] for one in refused]
    assert codes == ["invalid_request", "unknown_parameter"]
    assert [one.response and one.response.status_code for one in refused] == [400, 400]


def test_responses(gateway: RunningGateway) -> None:
    url = "/v1/responses"
    batch = ended(gateway, create(gateway, jsonl([line("a", url=url, body={"input": "Hi"})]), url))
    [answer] = results(gateway, batch.output_file_id)
    assert answer.response is not None
    assert answer.response.body["output"][0]["content"][0]["text"] == DEFAULT_ANSWER


def test_an_upload_goes_into_a_line(gateway: RunningGateway) -> None:
    stored = gateway.http.post(
        "/v1/media", content=picture(), headers={"content-type": "image/png"}
    ).json()
    body = {"image_url": f"media://{stored['id']}", "object": "red circle"}

    batch = ended(gateway, create(gateway, jsonl([line("a", url=POINT, body=body)]), POINT))

    assert batch.request_counts.completed == 1


BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    "no JSON": (b"{", "invalid_json_line", "not JSON"),
    "no object": (b"[]", "invalid_json_line", "no object"),
    "no UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", "not JSON"),
    "no custom_id": (jsonl([line("")]), "invalid_request", "custom_id"),
    "long custom_id": (jsonl([line("x" * 513)]), "invalid_request", "custom_id"),
    "method": (jsonl([line("a", method="GET")]), "invalid_request", "method"),
    "no body": (b'{"custom_id":"a","method":"POST","url":"/v1/point"}', "invalid_request", "body"),
    "body": (jsonl([line("a", body="text")]), "invalid_request", "body"),
    "field": (jsonl([line("a", more=1)]), "unknown_parameter", "more"),
    "url": (jsonl([line("a", url=POINT)]), "mismatched_url", POINT),
    "stream": (jsonl([line("a", body={"stream": True})]), "invalid_request", "leave stream out"),
    "deep": (
        b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"a":'
        + b"[" * 600
        + b"]" * 600
        + b"}}",
        "invalid_json_line",
        "cannot be passed on",
    ),
    "huge": (jsonl([line("a", "x" * 1_000_001)]), "line_too_long", "1,000,000 bytes"),
    "twice": (jsonl([line("good")]), "duplicate_custom_id", "'good'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_told_of(small_gateway: RunningGateway, case: str) -> None:
    bad, code, says = BAD_LINES[case]
    content = b"\xef\xbb\xbf" + jsonl([line("good")]) + b"\r\n" + bad.rstrip() + b"\r\n"

    batch = ended(small_gateway, create(small_gateway, content + jsonl([line("last")])))

    assert (batch.status, batch.output_file_id, batch.in_progress_at) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    [error] = batch.errors.data
    assert (error.code, error.line) == (code, 3)
    assert says in error.message
    assert small_gateway.engine.requests == []


def test_a_file_without_lines(gateway: RunningGateway) -> None:
    for content in (b"", b"\n \r\n\n"):
        batch = ended(gateway, create(gateway, content))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data] == ["empty_file"]


def test_many_bad_lines_are_told_of_in_part(gateway: RunningGateway) -> None:
    batch = ended(gateway, create(gateway, b"{}\n" * 1000))
    assert batch.errors is not None
    assert [error.line for error in batch.errors.data] == list(range(1, 101))


def test_what_no_batch_is_made_of(gateway: RunningGateway) -> None:
    file_id = upload(gateway, jsonl([line("a")]))
    good = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for fields, status, says in (
        ({"input_file_id": "file-none"}, 404, "upload the requests"),
        ({"endpoint": "/v1/media"}, 400, "/v1/chat/completions"),
        ({"endpoint": "/v1/embeddings"}, 400, "/v1/track"),
        ({"completion_window": "1d"}, 400, "as 24h"),
        ({"completion_window": "169h"}, 400, "168h"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {str(k): "" for k in range(17)}}, 400, "metadata"),
        ({"model": "molmo2"}, 400, "unknown field"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "3600"),
    ):
        response = gateway.http.post("/v1/batches", json=good | fields)
        assert response.status_code == status, fields
        assert says in error_of(response)["message"]
    for path in ("/v1/batches/batch_none", "/v1/batches?after=batch_none"):
        assert gateway.http.get(path).status_code == 404
    assert gateway.http.post("/v1/batches/batch_none/cancel").status_code == 404
    assert gateway.http.get("/v1/batches?limit=0").status_code == 400


def test_pages(gateway: RunningGateway) -> None:
    made = [create(gateway, jsonl([line("a")])) for _ in range(5)][::-1]
    first = gateway.http.get("/v1/batches?limit=3").json()
    assert [one["id"] for one in first["data"]] == made[:3]
    assert (first["first_id"], first["last_id"], first["has_more"]) == (made[0], made[2], True)
    second = gateway.http.get(f"/v1/batches?limit=2&after={first['last_id']}").json()
    assert [one["id"] for one in second["data"]] == made[3:]
    for batch_id in made:
        ended(gateway, batch_id)


# --- the course of a batch ----------------------------------------------------------------------


@pytest.fixture
def folder_of_batches(tmp_path: Path) -> Path:
    return tmp_path / "batches"


class Held(FakeEngine):
    """Answers what says `held` when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def _misbehave(self, question: str, request: Any) -> Any:
        if "held" in question:
            await asyncio.to_thread(self.gate.wait, 60)
        return await super()._misbehave(question, request)


@pytest.fixture
def held(folder: Path, tmp_path: Path, folder_of_batches: Path) -> Iterator[RunningGateway]:
    engine = Held()
    fields: dict[str, Any] = {"batch_dir": folder_of_batches, "batch_concurrent": 2}
    try:
        with running_gateway(folder, tmp_path, engine, **fields) as gateway:
            yield gateway
    finally:
        engine.gate.set()


def gate_of(gateway: RunningGateway) -> threading.Event:
    assert isinstance(gateway.engine, Held)
    return gateway.engine.gate


def asked(gateway: RunningGateway) -> list[str]:
    return sorted(question_of(body) for body in gateway.engine.requests)


def counts(batch: Batch) -> tuple[int, int, int]:
    told = batch.request_counts
    return told.total, told.completed, told.failed


def test_progress_and_cancelling(held: RunningGateway) -> None:
    lines = [line(f"{k}", "now" if k < 3 else f"held {k}") for k in range(9)]
    batch_id = create(held, jsonl(lines))
    until(lambda: len(asked(held)) == 5)

    batch = batch_of(held, batch_id)
    assert (batch.status, counts(batch)) == ("in_progress", (9, 3, 0))
    response = held.http.delete(f"/v1/files/{batch.input_file_id}")
    assert (response.status_code, "reads this file" in response.text) == (400, True)
    cancelled = held.http.post(f"/v1/batches/{batch_id}/cancel").json()

    assert cancelled["status"] == "cancelling"
    batch = ended(held, batch_id)
    assert (batch.status, counts(batch)) == ("cancelled", (9, 3, 0))
    assert batch.cancelling_at is not None
    assert batch.error_file_id is None
    assert [one.custom_id for one in results(held, batch.output_file_id)] == ["0", "1", "2"]
    assert len(asked(held)) == 5


def test_a_batch_whose_time_is_over(folder: Path, tmp_path: Path, folder_of_batches: Path) -> None:
    engine = Held()
    lines = [line(f"{k}", "now" if k < 2 else f"held {k}") for k in range(5)]
    fields: dict[str, Any] = {"batch_dir": folder_of_batches, "batch_concurrent": 2}
    with running_gateway(folder, tmp_path, engine, **fields) as gateway:
        batch_id = create(gateway, jsonl(lines), completion_window="1h")
        until(lambda: counts(batch_of(gateway, batch_id)) == (5, 2, 0))
    with closing(sqlite3.connect(folder_of_batches / "batches.db")) as db, db:
        db.execute(
            "UPDATE batches SET told = json_set(told, '$.expires_at', "
            "json_extract(told, '$.expires_at') - 7200)"  # the server was away for so long
        )
    with running_gateway(folder, tmp_path, engine, **fields) as gateway:
        batch = ended(gateway, batch_id)
        engine.gate.set()

        assert (batch.status, counts(batch)) == ("expired", (5, 2, 3))
        assert batch.expired_at is not None
        good, late = (results(gateway, i) for i in (batch.output_file_id, batch.error_file_id))
        assert [one.custom_id for one in good] == ["0", "1"]
        assert [one.custom_id for one in late] == ["2", "3", "4"]
        assert {one.error and one.error.code for one in late} == {"batch_expired"}
        assert {one.response for one in late} == {None}


def test_patience_with_an_engine_that_is_away(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path) as gateway:
        gateway.engine.is_healthy = False
        until(lambda: not gateway.is_ready())
        assert gateway.chat("Hi").status_code == 503
        batch_id = create(gateway, jsonl([line("a"), line("b", f"{Trick.BREAK_FIRST} x")]))
        until(lambda: batch_of(gateway, batch_id).status == "in_progress")
        gateway.engine.is_healthy = True
        assert counts(ended(gateway, batch_id)) == (2, 2, 0)


def test_a_line_that_breaks_every_engine(gateway: RunningGateway) -> None:
    lines = [line("good"), line("refused", f"{Trick.REFUSE} x"), line("broken", f"{Trick.FAIL} x")]

    batch = ended(gateway, create(gateway, jsonl(lines)))

    assert (batch.status, counts(batch)) == ("completed", (3, 1, 2))
    found = results(gateway, batch.error_file_id)
    told = [(one.custom_id, one.response and one.response.status_code) for one in found]
    assert told == [("refused", 400), ("broken", 502)]


def test_an_answer_waits_for_a_store_that_is_full(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molmo_server.batches.runner._LONGEST_PAUSE_S", 0.01)
    full = {"keep": 5, "finalize": 2, "end": 2, "checked": 1}
    for name in full:
        monkeypatch.setattr(JobStore, name, failing_at_first(getattr(JobStore, name), name, full))

    batch = ended(gateway, create(gateway, jsonl([line(f"{k}", f"{k}") for k in range(9)])))

    assert full == dict.fromkeys(full, 0)
    assert (batch.status, counts(batch)) == ("completed", (9, 9, 0))
    assert len(results(gateway, batch.output_file_id)) == 9
    assert asked(gateway) == [f"{k}" for k in range(9)]  # each once


def failing_at_first(
    method: Callable[..., Any], name: str, n_failures: dict[str, int]
) -> Callable[..., Any]:
    def failing(*given: Any, **named: Any) -> Any:
        if n_failures[name] > 0:
            n_failures[name] -= 1
            raise BatchStoreError("the disk is full")
        return method(*given, **named)

    return failing


def test_an_answer_names_no_more_than_a_request_would(gateway: RunningGateway) -> None:
    [answer] = results(
        gateway, ended(gateway, create(gateway, jsonl([line("a", "Hi")]))).output_file_id
    )
    assert answer.response is not None
    alone = gateway.chat("Hi").json()
    told = answer.response.body
    assert text_of(told) == text_of(alone) == DEFAULT_ANSWER
    assert told.keys() == alone.keys()


def test_tenants_do_not_see_each_other(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    ours, theirs = ({"authorization": f"Bearer {store.create(name)}"} for name in ("us", "them"))
    with running_gateway(folder, tmp_path, keys=tmp_path / "keys.db") as gateway:
        batch_id = create(gateway, jsonl([line("a")]), headers=ours)
        batch = ended(gateway, batch_id, headers=ours)
        assert batch.status == "completed"
        for method, path in (
            ("GET", f"/v1/files/{batch.input_file_id}"),
            ("GET", f"/v1/files/{batch.output_file_id}/content"),
            ("DELETE", f"/v1/files/{batch.output_file_id}"),
            ("GET", f"/v1/files?after={batch.input_file_id}"),
            ("GET", f"/v1/batches/{batch_id}"),
            ("POST", f"/v1/batches/{batch_id}/cancel"),
            ("GET", f"/v1/batches?after={batch_id}"),
        ):
            response = gateway.http.request(method, path, headers=theirs)
            assert (response.status_code, error_of(response)["code"]) == (404, "not_found"), path
            assert gateway.http.request(method, path).status_code == 401
        made = {"input_file_id": batch.input_file_id, "endpoint": CHAT}
        assert gateway.http.post("/v1/batches", json=made, headers=theirs).status_code == 404
        for path in ("/v1/files", "/v1/batches"):
            assert gateway.http.get(path, headers=theirs).json()["data"] == []
            assert gateway.http.get(path, headers=ours).json()["data"] != []
        today = partial(store.usage, n_days=1, now_s=time.time())
        until(lambda: any(usage.completion_tokens for usage in today()))
        assert [usage.name for usage in today() if usage.completion_tokens] == ["us"]
    store.close()


def test_a_key_that_ends_under_a_batch(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    first, second = (store.create("us") for _ in range(2))
    engine = Held()
    fields: dict[str, Any] = {"keys": tmp_path / "keys.db", "batch_concurrent": 1}
    ours = {"authorization": f"Bearer {second}"}
    lines = [line(f"{k}", "held") for k in range(2)]
    try:
        with running_gateway(folder, tmp_path, engine, **fields) as gateway:
            revoked = {"authorization": f"Bearer {first}"}
            rotated = create(gateway, jsonl(lines), headers=revoked)
            until(lambda: len(engine.requests) == 1)
            store.revoke(first)
            until(lambda: gateway.http.get("/v1/models", headers=revoked).status_code == 401)
            engine.gate.set()
            assert counts(ended(gateway, rotated, ours)) == (2, 2, 0)  # with the other key
            today = partial(store.usage, n_days=1, now_s=time.time())
            until(lambda: len(asked_of(today())) == 2)
            assert asked_of(today()) == {first[:12], second[:12]}

            engine.gate.clear()
            batch_id = create(gateway, jsonl(lines), headers=ours)
            until(lambda: len(engine.requests) == 3)
            store.revoke(second)
            until(lambda: gateway.http.get("/v1/models", headers=ours).status_code == 401)
            engine.gate.set()
            third = {"authorization": f"Bearer {store.create('us')}"}
            until(lambda: gateway.http.get("/v1/models", headers=third).status_code == 200)
            assert ended(gateway, batch_id, third).has_ended
    finally:
        engine.gate.set()
        store.close()


def asked_of(rows: list[KeyUsage]) -> set[str]:
    return {row.key for row in rows if row.completion_tokens}


def test_a_limited_key_is_waited_for(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    limited = {"authorization": f"Bearer {store.create('us', requests_per_min=60)}"}
    free = {"authorization": f"Bearer {store.create('us')}"}
    with running_gateway(folder, tmp_path, keys=tmp_path / "keys.db") as gateway:
        batch_id = create(gateway, jsonl([line(f"{k}") for k in range(30)]), headers=limited)
        until(lambda: counts(batch_of(gateway, batch_id, free))[1] == 28)
        left = gateway.http.get("/v1/models", headers=limited)  # half is for those who wait
        assert int(left.headers["x-ratelimit-remaining-requests"]) >= 28
        assert counts(ended(gateway, batch_id, free)) == (30, 30, 0)
    store.close()
