"""A gateway with keys: who gets in, what is refused, what is counted, what is never written."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_client import Client
from molmo_client.retries import RetryPolicy
from molmo_core.errors import KeyStoreError, RateLimited
from molmo_server.engine_pool.fake import FakeEngine, Trick, question_of
from molmo_server.tenancy.store import KeyStore, Usage, prefix_of
from tests.server.media import data_url, image_part, picture, text_part
from tests.support.gateway import RunningGateway, error_of, events_of, running_gateway, until

Start = Callable[..., AbstractContextManager[RunningGateway]]
WRONG = "molmo-" + "x" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    """As `molmo keys` opens the file, beside the server."""
    opened = KeyStore(tmp_path / "keys.db")
    yield opened
    opened.close()


@pytest.fixture
def start(store: KeyStore, folder: Path, tmp_path: Path) -> Start:
    def start(engine: FakeEngine | None = None, **fields: Any) -> Any:
        return running_gateway(folder, tmp_path, engine, keys=tmp_path / "keys.db", **fields)

    return start


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def status(gateway: RunningGateway, path: str, key: str) -> int:
    return gateway.http.get(path, headers=bearer(key)).status_code


def test_only_what_tells_of_the_service_is_open(start: Start, store: KeyStore) -> None:
    key = store.create("acme")
    with start() as gateway:
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert gateway.http.get(path).status_code == 200
        posts = ("/v1/chat/completions", "/v1/point", "/v1/caption")
        for answer in (
            *(gateway.http.post(path, content=b"no JSON") for path in posts),
            *(gateway.http.get(path) for path in ("/v1/models", "/v1/models/molmo2")),
            gateway.http.get("/v1/models", headers=bearer(WRONG)),
            gateway.http.get("/v1/models", headers=bearer(key[:-1])),
            gateway.http.get("/v1/models", headers={"authorization": f"Basic {key}"}),
            gateway.http.get("/admin/usage"),
        ):
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert gateway.engine.requests == []
        assert gateway.chat("Hi").status_code == 401
        assert status(gateway, "/v1/models", key) == 200
        with Client(gateway.url, api_key=key) as client:
            assert client.point(picture(), "the red circle").count == 1


def test_a_stranger_is_refused_before_the_body_has_come(start: Start) -> None:
    with start() as gateway, gateway.connection() as caller:
        caller.putrequest("POST", "/v1/chat/completions")
        caller.putheader("content-type", "application/json")
        caller.putheader("content-length", "1000000")
        caller.endheaders()
        assert caller.getresponse().status == 401


def test_keys_come_and_go_without_a_restart(start: Start, store: KeyStore) -> None:
    with start() as gateway:
        key = store.create("acme")
        until(lambda: status(gateway, "/v1/models", key) == 200, limit_s=5)
        store.revoke(prefix_of(key))
        until(lambda: status(gateway, "/v1/models", key) == 401, limit_s=5)


def test_admin_routes_take_the_admin_key_and_keys_of_scope_admin(
    start: Start, store: KeyStore
) -> None:
    admin, infer = store.create("ops", scope="admin"), store.create("acme")
    with start(admin_key="choose-one") as gateway:
        for path in ("/admin/usage", "/admin/checkpoints"):
            assert status(gateway, path, "choose-one") == 200
            assert status(gateway, path, admin) == 200
            assert status(gateway, path, WRONG) == 401
            refused = gateway.http.get(path, headers=bearer(infer))
            assert (refused.status_code, error_of(refused)["code"]) == (403, "forbidden")
        assert status(gateway, "/v1/models", admin) == 200
        assert status(gateway, "/v1/models", "choose-one") == 401
        bad = gateway.http.get("/admin/usage?days=0", headers=bearer(admin))
        assert (bad.status_code, error_of(bad)["param"]) == (400, "days")


def test_without_keys_usage_is_not_counted(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path, admin_key="choose-one") as gateway:
        refused = gateway.http.get("/admin/usage", headers=bearer("choose-one"))
        assert refused.status_code == 404
        assert "MOLMO_KEYS" in error_of(refused)["message"]


def test_requests_a_minute(start: Start, store: KeyStore) -> None:
    key, other = store.create("acme", requests_per_min=2), store.create("other")
    with start() as gateway:
        headers = gateway.http.get("/v1/models", headers=bearer(key)).headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "1"
        assert 29 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
        gateway.http.headers.update(bearer(key))
        assert gateway.chat("Hi", stream=True).headers["x-ratelimit-remaining-requests"] == "0"

        refused = gateway.chat("Hi")
        error = error_of(refused)
        assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(gateway.engine.requests) == 1
        allowed = gateway.http.get("/v1/models", headers=bearer(other))
        assert allowed.status_code == 200
        assert "x-ratelimit-limit-requests" not in allowed.headers


def test_visual_tokens_a_minute(start: Start, store: KeyStore) -> None:
    key = store.create("acme", visual_tokens_per_min=15)
    with start() as gateway:
        gateway.http.headers.update(bearer(key))
        ask = {"image_url": data_url(picture()), "object": "x"}

        first = gateway.http.post("/v1/point", json=ask)
        second = gateway.http.post("/v1/point", json=ask)
        both = gateway.chat([image_part(picture()), image_part(picture()), text_part("x")])

        assert first.status_code == 200
        left = int(first.headers["x-ratelimit-remaining-visual-tokens"])
        assert 0 < left < 15 - left  # one picture is more than half of it
        assert (second.status_code, error_of(second)["code"]) == (429, "rate_limit_exceeded")
        assert f"this request takes {15 - left}" in error_of(second)["message"]
        assert int(second.headers["retry-after"]) >= 1
        assert (both.status_code, error_of(both)["code"]) == (400, "too_many_media")
        assert gateway.chat("Hi").status_code == 200
        assert len(gateway.engine.requests) == 2


def test_requests_at_the_same_time(start: Start, store: KeyStore) -> None:
    key = store.create("acme", n_concurrent=1)
    with start() as gateway:
        gateway.http.headers.update(bearer(key))
        body = {"messages": [{"role": "user", "content": "[slow]"}], "stream": True}
        with gateway.http.stream("POST", "/v1/chat/completions", json=body) as running:
            refused = gateway.chat("Hi")
            assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"] == "1"
            running.read()
        until(lambda: gateway.chat("Hi").status_code == 200)


def test_a_flood_of_one_tenant_does_not_starve_another(start: Start, store: KeyStore) -> None:
    flood, small = store.create("flood"), store.create("small")
    engine = FakeEngine(seconds_per_piece=0.2)  # the first answer takes seconds, see below
    with start(engine, max_concurrent=1, max_queued=20) as gateway:
        statuses: dict[str, int] = {}

        def ask(key: str, text: str) -> None:
            body = {"messages": [{"role": "user", "content": text}]}
            url = f"{gateway.url}/v1/chat/completions"
            answer = httpx2.post(url, json=body, headers=bearer(key), timeout=60)
            statuses[text] = answer.status_code

        def asking(key: str, text: str) -> threading.Thread:
            thread = threading.Thread(target=ask, args=(key, text))
            thread.start()
            return thread

        threads = [asking(flood, f"flood {k}") for k in range(12)]
        until(lambda: "molmo_queued 11.0" in gateway.http.get("/metrics").text)
        threads += [asking(small, "small")]
        until(lambda: "molmo_queued 12.0" in gateway.http.get("/metrics").text)
        engine.seconds_per_piece = 0.0
        for thread in threads:
            thread.join(timeout=60)

        order = [question_of(body).split()[0] for body in engine.requests]
        assert order[:4] == ["flood", "flood", "small", "flood"]
        assert len(order) == 13
        assert set(statuses.values()) == {200}


def test_usage_is_counted_and_written(start: Start, store: KeyStore) -> None:
    key, admin = store.create("acme"), store.create("ops", scope="admin")
    store.create("idle")
    engine = FakeEngine(default="four" * 5)
    with start(engine) as gateway:
        gateway.http.headers.update(bearer(key))
        content = [image_part(picture()), text_part("x")]
        gateway.chat(content)
        hidden = events_of(gateway.stream_bytes(content))
        told = events_of(gateway.stream_bytes(content, stream_options={"include_usage": True}))
        gateway.chat("Hi", temperatur=1)  # refused: a request without tokens

        assert all("usage" not in event for event in hidden)
        assert told[-2]["usage"]["completion_tokens"] == 5
        assert [e for e in told if "usage" not in e][:-1] == [
            {**e, "id": t["id"]} for e, t in zip(hidden, told, strict=False)
        ][:-1]

        answer = gateway.http.get("/admin/usage?days=1", headers=bearer(admin)).json()
        [row] = answer["usage"]
        gateway.chat("Hi")  # written at the end, at the latest

    assert (row["name"], row["key"]) == ("acme", prefix_of(key))
    assert (row["requests"], row["completion_tokens"]) == (4, 15)
    assert row["prompt_tokens"] == 3  # as the scripted engine tells: a word each
    assert row["visual_tokens"] % 3 == 0 < row["visual_tokens"]
    [later] = store.usage(n_days=1, now_s=time.time())
    assert (later.requests, later.completion_tokens) == (5, 20)
    assert later.visual_tokens == row["visual_tokens"]
    assert store.usage(n_days=1, now_s=time.time() + 2 * 86_400) == []


def test_a_stream_that_breaks_is_counted_by_its_pieces(start: Start, store: KeyStore) -> None:
    key = store.create("acme")
    with start() as gateway:
        gateway.http.headers.update(bearer(key))
        events = events_of(gateway.stream_bytes(str(Trick.BREAK)))
    pieces = [e for e in events[:-1] if e["choices"][0]["delta"].get("content")]
    [row] = store.usage(n_days=1, now_s=time.time())
    assert row.completion_tokens == len(pieces) > 0
    assert row.prompt_tokens > 0


def test_no_key_is_ever_written_down(
    start: Start, store: KeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, revoked = store.create("acme", requests_per_min=2), store.create("acme")
    store.revoke(prefix_of(revoked))
    with start(admin_key="the-admin-key") as gateway:
        told = [
            gateway.http.get(path, headers=bearer(sent)).text
            for sent in (key, revoked, WRONG, "the-admin-key")
            for path in ("/v1/models", "/admin/usage", "/metrics")
        ]
        told += [str(gateway.http.get("/v1/models", headers=bearer(key)).headers)]
    with pytest.raises(KeyStoreError) as refusal:
        store.revoke(WRONG)

    lines = [str(vars(r)) for r in caplog.records if r.name.startswith("molmo_server")]
    assert any("'tenant': 'acme', 'key_prefix': 'molmo-" in line for line in lines)
    files = [path.read_bytes().decode("latin-1") for path in tmp_path.glob("keys.db*")]
    texts = [*told, *lines, *files, refusal.value.message]
    sent = (key, revoked, WRONG, "the-admin-key")
    assert [text for text in texts for secret in sent if secret in text] == []


def test_a_client_gets_the_limit_as_an_error_of_the_tree(start: Start, store: KeyStore) -> None:
    key = store.create("acme", requests_per_min=1)
    with start() as gateway, Client(gateway.url, api_key=key) as client:
        client.caption(picture())
        with (
            Client(gateway.url, api_key=key, retries=RetryPolicy(n_retries=0)) as hasty,
            pytest.raises(RateLimited, match="1 requests a minute") as refused,
        ):
            hasty.caption(picture())
        assert refused.value.retry_after_s is not None


def test_usage_is_kept_while_the_file_cannot_be_written(
    start: Start, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.create("acme")
    n_failures = 0

    def fail(self: KeyStore, used: dict[tuple[str, str], Usage]) -> None:
        nonlocal n_failures
        n_failures += 1
        raise KeyStoreError("the disk is full")

    with start() as gateway, monkeypatch.context() as patch:
        patch.setattr(KeyStore, "add_usage", fail)
        assert status(gateway, "/v1/models", key) == 200
        until(lambda: n_failures >= 2)
        assert status(gateway, "/v1/models", key) == 200
    [row] = store.usage(n_days=1, now_s=time.time())
    assert row.requests == 2
