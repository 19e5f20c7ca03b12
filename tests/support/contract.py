"""A gateway asked by its own OpenAPI document: schemathesis over every operation that stands there.

Bodies are valid and not, texts hostile; where a valid body asks for a picture or video it mostly
gets a real one, so that answers are checked and not only refusals. Callers have a key of scope
admin; that a closed operation answers nobody without one is among the checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import schemathesis
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.generation.jsonschema import strategy
from schemathesis.transport.serialization import Binary

from molmo_server.tenancy.store import KeyStore
from tests.server.media import data_url, picture, video
from tests.support.fake_completions import FakeWithCompletions
from tests.support.gateway import RunningGateway, running_gateway

_NOT_CHECKED = ("positive_data_acceptance", "ensure_resource_availability")
"""A document cannot say all that is refused: too many tokens, a medium that is damaged."""
_PNG, _MP4 = picture(), video(n_frames=5)
_JSONL = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}'
_MEDIA: dict[str, Any] = {
    "picture-url": data_url(_PNG),
    "video-url": data_url(_MP4, "video/mp4"),
    "picture-file": _PNG,
    "some-file": [_PNG, _JSONL],
    "video-file": _MP4,
}
_FORMATS = {
    "image_url": "picture-url",
    "images": "picture-url",
    "video_url": "video-url",
    "image": "picture-file",
    "file": "some-file",
    "video": "video-file",
}
"""Which of them a field is filled with."""
_URLS = {"ImageUrl": "picture-url", "VideoUrl": "video-url"}
"""The same for the field `url` of a schema."""
_SAMPLE_CHARS = 2000


@dataclass(kw_only=True)
class Contract:
    gateway: RunningGateway
    key: str
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many of each operation and status."""
    complaints: list[str] = field(default_factory=list)

    def ask(self, *, n_examples: int) -> None:
        """Ask every operation: its boundary values, then `n_examples`, then sequences of them."""
        with _files_judged_as_texts():
            for event in from_schema(self._schema(n_examples)).execute():
                if isinstance(event, (events.NonFatalError, events.FatalError)):
                    self.complaints.append(repr(event))
                elif isinstance(event, events.ScenarioFinished):
                    self._note(event)

    @property
    def operations(self) -> set[str]:
        document = self.gateway.http.get("/openapi.json").json()
        return {
            f"{method.upper()} {path}" for path, of in document["paths"].items() for method in of
        }

    def _schema(self, n_examples: int) -> Any:
        config = SchemathesisConfig.from_dict(
            {
                "base-url": self.gateway.url,
                "auth": {"openapi": {"key": {"bearer": self.key}}},
                "continue-on-failure": True,
                "generation": {"max-examples": n_examples, "deterministic": True},
                "checks": {name: {"enabled": False} for name in _NOT_CHECKED},
            }
        )
        document = self.gateway.http.get("/openapi.json").json()
        return schemathesis.openapi.from_dict(_with_real_media(document), config=config)

    def _note(self, event: events.ScenarioFinished) -> None:
        for name, interaction in event.recorder.interactions.items():
            case = event.recorder.cases[name].value
            status = interaction.response.status_code if interaction.response else 0
            self.answers[case.operation.label, status] += 1
        for checks in event.recorder.checks.values():
            for check in checks:
                if (failed := check.failure_info) is not None:
                    sample = failed.code_sample[:_SAMPLE_CHARS]
                    self.complaints.append(
                        f"{event.label}: {check.name}: {failed.failure}\n{sample}"
                    )


@contextmanager
def contract(folder: Path, scratch: Path, **settings: Any) -> Iterator[Contract]:
    """A gateway that asks for keys, in front of the scripted engine."""
    store = KeyStore(scratch / "keys.db")
    key = store.create("contract", scope="admin")
    store.close()
    settings["keys"] = scratch / "keys.db"
    with running_gateway(folder, scratch, FakeWithCompletions(), **settings) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {key}"
        yield Contract(gateway=gateway, key=key)


@contextmanager
def _files_judged_as_texts() -> Iterator[None]:
    """Where a schema rules out what another allows, schemathesis has each drawn value judged by a
    validator, which raises ValueError at the bytes of a file."""
    build = strategy._validator

    def validator(schema: Any) -> Callable[[Any], bool]:
        is_valid = build(schema)
        return lambda value: is_valid(_without_bytes(value))

    with patch.object(strategy, "_validator", validator):
        yield


def _without_bytes(value: Any) -> Any:
    if isinstance(value, Binary):
        return ""
    if isinstance(value, dict):
        return {name: _without_bytes(one) for name, one in value.items()}
    return [_without_bytes(one) for one in value] if isinstance(value, list) else value


def _with_real_media(document: dict[str, Any]) -> dict[str, Any]:
    """The document with formats at strings that stand for media: most get a real one then."""
    for name, medium in _MEDIA.items():
        media = medium if isinstance(medium, list) else [medium]
        wild = st.text() if isinstance(media[0], str) else st.binary()
        real = st.sampled_from(media)
        schemathesis.openapi.format(name, st.one_of(real, real, real, wild))
    for name, schema in document["components"]["schemas"].items():
        if name in _URLS:
            _mark(schema["properties"]["url"], _URLS[name])
    _mark_fields(document)
    return document


def _mark_fields(node: Any) -> None:
    if isinstance(node, list):
        for one in node:
            _mark_fields(one)
    if isinstance(node, dict):
        for name, schema in (node.get("properties") or {}).items():
            if name in _FORMATS and isinstance(schema, dict):
                _mark(schema, _FORMATS[name])
        for one in node.values():
            _mark_fields(one)


def _mark(schema: dict[str, Any], name: str) -> None:
    if schema.get("type") == "string":
        schema["format"] = name
    within = [schema["items"]] if "items" in schema else []
    for one in (*within, *schema.get("anyOf", ())):
        _mark(one, name)
