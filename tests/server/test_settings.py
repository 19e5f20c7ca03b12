"""Settings that contradict each other, and what is shown of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from molmo_client.__main__ import main
from molmo_server.settings import MolmoSettings


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"default_max_tokens": 10, "max_tokens_limit": 5}, "more than max_tokens_limit"),
        ({"first_backoff_s": 9, "longest_backoff_s": 1}, "more than longest_backoff_s"),
        ({"engine_urls": "http://e", "swap_way": "blue_green"}, "of this server's own"),
        ({"engine_urls": "http://e", "canary_share": 0.1}, "of this server's own"),
        ({"least_same": 0.9}, "shadow_share is 0"),
        ({"limits": "redis://r"}, "set keys, or leave limits"),
        ({"limits": "http://r", "keys": "keys.db"}, "limits begins otherwise than redis://"),
        ({"otlp_endpoint": "collector:4318"}, "otlp_endpoint begins otherwise than http://"),
        ({"cors_origins": "app.example.org"}, "cors_origins has 'app.example.org'"),
        ({"cors_origins": "https://app.example.org/page"}, "without a path"),
        ({"swap_way": "in_place", "gate_command": "true"}, "gate_command needs a second engine"),
    ],
)
def test_contradictions(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says.replace("*", r"\*")):
        MolmoSettings(**fields)


def test_what_is_said_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO_LIMITS", "redis://:secret@r")
    assert main(["serve", "--print-config"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == (
        "molmo serve: settings: limits are those of keys, and keys are not asked for; set keys, or "
        "leave limits out\n"
    )


def test_the_settings_are_shown_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO_ADMIN_KEY", "secret-1")
    monkeypatch.setenv("MOLMO_KEYS", "postgresql://acme:secret-2@db/keys?sslmode=require")
    monkeypatch.setenv("MOLMO_LIMITS", "rediss://:secret-3@redis/0")
    monkeypatch.setenv("MOLMO_CORS_ORIGINS", "https://a.example, https://b.example")
    assert main(["serve", "--port", "9000", "--print-config"]) == 0
    written = capsys.readouterr()
    shown = json.loads(written.out)
    assert shown.keys() == MolmoSettings.model_fields.keys()
    assert (shown["port"], shown["max_images"]) == (9000, 4)
    assert shown["cors_origins"] == ["https://a.example", "https://b.example"]
    assert shown["keys"] == "postgresql://acme:***@db/keys?sslmode=require"
    assert shown["limits"] == "rediss://:***@redis/0"
    assert "secret" not in written.out + written.err + repr(MolmoSettings())


def test_a_misspelt_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO_MAX_IMAGE", "3")
    monkeypatch.setenv("MOLMO_API_KEY", "the client's")
    assert main(["serve", "--print-config"]) == 0
    assert capsys.readouterr().err == (
        "molmo serve: MOLMO_MAX_IMAGE is no setting and has no effect; "
        "did you mean MOLMO_MAX_IMAGES?\n"
    )
