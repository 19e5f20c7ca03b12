"""Which JSON schemas an answer may be held to, and what becomes of the others."""

from __future__ import annotations

from typing import Any

import pytest

from molmo_core.errors import InvalidRequest
from molmo_server.openai_api.response_format import (
    JsonFormat,
    NamedSchema,
    SchemaFormat,
    TextFormat,
    held_to,
)
from tests.support.gateway import RunningGateway, assert_refused


def hold(schema: dict[str, Any], max_bytes: int = 16_384) -> dict[str, Any]:
    named = NamedSchema.model_validate({"name": "x", "schema": schema})
    form = SchemaFormat(type="json_schema", json_schema=named)
    return held_to(form, max_bytes=max_bytes, param="response_format")


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


TEXT = {"type": "string"}
TREE = of(value=TEXT, children={"type": "array", "items": {"$ref": "#"}})
GOOD: dict[str, dict[str, Any]] = {
    "empty": {},
    "plain": {**of(a=TEXT, n={"type": ["integer", "null"]}), "additionalProperties": False},
    "enum": {"enum": ["a", 1, None], "title": "X", "description": "d", "default": "a"},
    "number": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2**53},
    "list": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1000},
    "pair": {"type": "array", "prefixItems": [TEXT, {"const": 3}], "items": False},
    "tree": TREE,
    "named tree": {"$defs": {"n": of(c={"type": "array", "items": {"$ref": "#/$defs/n"}})}},
    "choice": {"anyOf": [TEXT, {"type": "null"}, of(a={"$ref": "#/properties/a"})]} | of(a=TEXT),
    "names of keywords": of(pattern=TEXT, format=TEXT, **{"$ref": TEXT}),
}


@pytest.mark.parametrize("name", GOOD)
def test_these_are_passed_on_as_they_are(name: str) -> None:
    assert hold(GOOD[name]) == {"structured_outputs": {"json": GOOD[name]}}


def test_forms_without_a_schema() -> None:
    json = held_to(JsonFormat(type="json_object"), max_bytes=9, param="x")
    assert json == {"structured_outputs": {"json_object": True}}
    assert held_to(TextFormat(type="text"), max_bytes=9, param="x") == {}
    assert held_to(None, max_bytes=9, param="x") == {}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = TEXT
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "pattern": ({**TEXT, "pattern": "(a+)+$"}, "keyword 'pattern'"),
    "length": (of(a={**TEXT, "maxLength": 300}), "keyword 'maxLength'"),
    "inside a choice": ({"anyOf": [TEXT, {"not": TEXT}]}, "keyword 'not'"),
    "inside a definition": ({"$defs": {"a": {"allOf": [TEXT]}}}, "keyword 'allOf'"),
    "type": ({"type": "text"}, "type has a value"),
    "no types": ({"type": []}, "type has a value"),
    "no choices": ({"anyOf": []}, "anyOf has a value"),
    "no values": ({"enum": []}, "enum has a value"),
    "number": ({"minimum": "1"}, "minimum has a value"),
    "truth": ({"minItems": True}, "minItems has a value"),
    "large": ({"maximum": 2**60}, "maximum has a value"),
    "required": ({**of(a=TEXT), "required": ["b"]}, "required names 'b'"),
    "required kind": ({"required": [1]}, "required has a value"),
    "properties": ({"properties": [TEXT]}, "properties has a value"),
    "no schema": ({"items": [TEXT]}, "got list where a schema belongs"),
    "no schema either": (of(a=True), "got bool where a schema belongs"),
    "deep": (nested(33), "more than 32 deep"),
    "nowhere": ({"$ref": "#/$defs/a"}, "leads nowhere"),
    "elsewhere": ({"$ref": "http://169.254.169.254/x"}, "leads nowhere"),
    "reference kind": ({"$ref": 3}, "$ref has a value"),
    "itself": ({"$ref": "#"}, "in a circle"),
    "itself or else": ({"anyOf": [{"$ref": "#"}, TEXT]}, "in a circle"),
    "each other": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "in a circle",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_these_are_refused(name: str) -> None:
    schema, says = BAD[name]
    with pytest.raises(InvalidRequest) as raised:
        hold(schema)
    assert says in raised.value.message
    assert raised.value.param == "response_format"


def test_references_are_followed_once() -> None:
    """Three ways from each of thirty to the next are 3^30 ways."""
    links = {f"d{k}": {"anyOf": [{"$ref": f"#/$defs/d{k + 1}"}] * 3} for k in range(30)}

    assert hold({"$defs": {**links, "d30": TEXT}, "$ref": "#/$defs/d0"})


def test_a_schema_has_a_size() -> None:
    schema = {"enum": ["x" * 100]}
    assert hold(schema, max_bytes=113)
    with pytest.raises(InvalidRequest, match="has 113 bytes, allowed are 112"):
        hold(schema, max_bytes=112)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_the_engine_never_sees_them(gateway: RunningGateway, path: str) -> None:
    named = {"name": "x", "schema": {"$ref": "#"}}
    if path.endswith("responses"):
        body: Any = {"input": "Hi", "text": {"format": {"type": "json_schema", **named}}}
    else:
        form = {"type": "json_schema", "json_schema": named}
        body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": form}

    error = assert_refused(gateway, gateway.http.post(path, json=body), "in a circle")

    assert error["param"] in ("response_format", "text.format")
