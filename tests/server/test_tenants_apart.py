"""What one tenant sent is no other's: uploads, caches, the time that a look takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.tenancy.salts import TenantSalts
from molmo_server.tenancy.store import KeyStore
from tests.server.media import data_url, picture
from tests.server.test_routes_ops import sample
from tests.support.fake_completions import FakeWithCompletions
from tests.support.gateway import RunningGateway, error_of, running_gateway

PNG = picture()
HITS = "molmo_media_cache_hits_total"


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[dict[str, str]]:
    store = KeyStore(tmp_path / "keys.db")
    yield {"a": store.create("a"), "b": store.create("b"), "b2": store.create("b")}
    store.close()


@pytest.fixture
def keyed(keys: dict[str, str], folder: Path, tmp_path: Path) -> Iterator[RunningGateway]:
    fields: dict[str, Any] = {"keys": tmp_path / "keys.db", "media_dir": tmp_path / "media"}
    with running_gateway(folder, tmp_path, FakeWithCompletions(), **fields) as gateway:
        yield gateway


def ask(gateway: RunningGateway, key: str, method: str, path: str, **more: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})}
    return gateway.http.request(method, path, headers=headers, **more)


def upload(gateway: RunningGateway, key: str) -> str:
    kind = {"content-type": "image/png"}
    answer = ask(gateway, key, "POST", "/v1/media", content=PNG, headers=kind).json()
    media_id: str = answer["id"]
    return media_id


def test_an_upload_is_its_tenants(
    keyed: RunningGateway, keys: dict[str, str], tmp_path: Path
) -> None:
    media_id = upload(keyed, keys["a"])
    assert media_id == f"media-{hashlib.sha256(PNG).hexdigest()[:32]}"
    fields = {"image_url": f"media://{media_id}", "object": "x"}
    (file,) = (tmp_path / "media").iterdir()
    as_stored = {"image_url": f"media://{file.name}", "object": "x"}

    for key, expected in (("a", 200), ("b", 404)):
        assert ask(keyed, keys[key], "GET", f"/v1/media/{media_id}").status_code == expected
        assert ask(keyed, keys[key], "POST", "/v1/point", json=fields).status_code == expected
        for name in (file.name, f"{media_id}."):
            assert ask(keyed, keys[key], "GET", f"/v1/media/{name}").status_code == 404
        assert ask(keyed, keys[key], "POST", "/v1/point", json=as_stored).status_code == 404
    refused = ask(keyed, keys["b"], "DELETE", f"/v1/media/{media_id}")
    assert (refused.status_code, error_of(refused)["code"]) == (404, "media_not_found")

    assert upload(keyed, keys["b"]) == media_id
    assert ask(keyed, keys["b2"], "DELETE", f"/v1/media/{media_id}").status_code == 200
    assert ask(keyed, keys["b"], "GET", f"/v1/media/{media_id}").status_code == 404
    assert ask(keyed, keys["a"], "GET", f"/v1/media/{media_id}").status_code == 200


def test_uploads_of_tenants_stay_over_a_restart(
    keys: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"keys": tmp_path / "keys.db", "media_dir": tmp_path / "media"}
    with running_gateway(folder, tmp_path, **fields) as gateway:
        media_id = upload(gateway, keys["a"])
    with running_gateway(folder, tmp_path, **fields) as gateway:
        assert ask(gateway, keys["a"], "GET", f"/v1/media/{media_id}").status_code == 200
        assert ask(gateway, keys["b"], "GET", f"/v1/media/{media_id}").status_code == 404
    with running_gateway(folder, tmp_path, media_dir=tmp_path / "media") as open_to_all:
        assert open_to_all.http.get(f"/v1/media/{media_id}").status_code == 404


def test_caches_of_tenants_are_salted(keyed: RunningGateway, keys: dict[str, str]) -> None:
    fields = {"image_url": data_url(PNG), "object": "x"}
    for key in ("a", "b", "b2", "b"):
        assert ask(keyed, keys[key], "POST", "/v1/point", json=fields).status_code == 200
    salts = [body["cache_salt"] for body in keyed.engine.requests]
    assert len(salts[0]) == 32
    assert salts[0] != salts[1] == salts[2] == salts[3]
    media = [body["media_io_kwargs"] for body in keyed.engine.requests]
    assert media == [{k: {"tenant": salt} for k in ("image", "video")} for salt in salts]
    assert sample(keyed, HITS) == 2, "a look of b's is none of a's"


def test_a_text_is_salted_too(keyed: RunningGateway, keys: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = ask(keyed, keys["a"], "POST", "/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 200
    in_chat = keyed.engine.requests[-1]
    assert "media_io_kwargs" not in in_chat
    plain = ask(keyed, keys["a"], "POST", "/v1/completions", json={"prompt": "Hi"})
    assert plain.status_code == 200, plain.text
    assert keyed.engine.requests[-1]["cache_salt"] == in_chat["cache_salt"]
    assert len(in_chat["cache_salt"]) == 32


def test_without_keys_nothing_is_salted(gateway: RunningGateway) -> None:
    fields = {"image_url": data_url(PNG), "object": "x"}
    assert gateway.http.post("/v1/point", json=fields).status_code == 200
    assert not {"cache_salt", "media_io_kwargs"} & gateway.engine.requests[-1].keys()


def test_a_salt_tells_nothing_without_the_secret() -> None:
    one, other = TenantSalts(b"1" * 32), TenantSalts(b"2" * 32)
    assert one.of("acme") == one.of("acme") != other.of("acme")
    assert one.of("acme") != one.of("acm")
    assert one.of("") == ""
    assert TenantSalts().of("acme") != TenantSalts().of("acme")
