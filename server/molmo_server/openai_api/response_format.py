"""The form that an answer is held to: text, any JSON, or JSON of a schema.

The engine compiles a schema to a grammar. What is let through here compiles in a fraction of a
second and always has an answer: keywords that the grammar would ignore, bounds on the length of
strings (seconds of compiling) and references that go in a circle are refused.

Knows: JSON schema as far as the engine's grammar (xgrammar) holds to it. Does not know: grammars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from molmo_core.api_requests import StrictRequest
from molmo_core.errors import InvalidRequest

_MAX_DEPTH = 32
_LARGEST_NUMBER = 2**53
_NOTES = {"$schema", "$id", "title", "description", "default", "examples", "discriminator"}
_NUMBERS = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minItems", "maxItems", "minProperties", "maxProperties"),
}
_VALUES = {"type", "required", "enum", "const", "$ref"}
_ONE_SCHEMA = {"items", "additionalProperties"}
_SCHEMAS = {"anyOf", "oneOf", "prefixItems"}
_NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
_TAKEN = _NOTES | _NUMBERS | _VALUES | _ONE_SCHEMA | _SCHEMAS | _NAMED_SCHEMAS
_TYPES = {"string", "number", "integer", "boolean", "null", "array", "object"}


class NamedSchema(StrictRequest):
    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Taken for OpenAI's sake: every answer is held to the schema."""


class TextFormat(StrictRequest):
    type: Literal["text"]


class JsonFormat(StrictRequest):
    type: Literal["json_object"]


class SchemaFormat(StrictRequest):
    """As chat completions have it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """As responses have it."""

    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]
ResponsesFormat = Annotated[TextFormat | JsonFormat | FlatSchemaFormat, Field(discriminator="type")]


def held_to_json(form: object) -> bool:
    """Whether an answer of this form is decoded under a grammar."""
    return form is not None and not isinstance(form, TextFormat)


def held_to(
    form: TextFormat | JsonFormat | SchemaFormat | FlatSchemaFormat | None,
    *,
    max_bytes: int,
    param: str,
) -> dict[str, Any]:
    """The engine's option for this form; none for text. Raises InvalidRequest at `param`."""
    if form is None or isinstance(form, TextFormat):
        return {}
    if isinstance(form, JsonFormat):
        return {"structured_outputs": {"json_object": True}}
    schema = (form.json_schema if isinstance(form, SchemaFormat) else form).schema_
    n_bytes = len(orjson.dumps(schema))
    if n_bytes > max_bytes:
        raise InvalidRequest(
            f"the schema has {n_bytes:,} bytes, allowed are {max_bytes:,}; send a smaller one",
            param=param,
        )
    try:
        _Checked(schema).check()
    except ValueError as error:
        raise InvalidRequest(f"the schema cannot be used: {error}", param=param) from error
    return {"structured_outputs": {"json": schema}}


class _Checked:
    """One schema; `check` raises ValueError with what is wrong."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._in_order: set[int] = set()
        """Schemas that lead into no circle; each is followed once."""

    def check(self) -> None:
        for schema in self._all(self._root, 0):
            self._check_circle(schema, ())

    def _all(self, schema: Any, depth: int) -> Iterator[dict[str, Any]]:
        """Every schema in this one, itself first, each checked by itself."""
        if not isinstance(schema, dict):
            raise ValueError(f"got {type(schema).__name__} where a schema belongs; send an object")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep; make it flatter")
        _check_keywords(schema)
        yield schema
        for keyword in schema.keys() & _ONE_SCHEMA:
            if not isinstance(schema[keyword], bool):
                yield from self._all(schema[keyword], depth + 1)
        for keyword in schema.keys() & (_SCHEMAS | _NAMED_SCHEMAS):
            members = schema[keyword]
            for member in members.values() if isinstance(members, dict) else members:
                yield from self._all(member, depth + 1)

    def _check_circle(self, schema: dict[str, Any], passed: tuple[int, ...]) -> None:
        """A schema that leads to itself without a value between has no answer."""
        if id(schema) in passed:
            raise ValueError("its references go in a circle; put an object or an array between")
        if id(schema) in self._in_order:
            return
        passed = (*passed, id(schema))
        if "$ref" in schema:
            self._check_circle(self._target(schema["$ref"]), passed)
        for keyword in ("anyOf", "oneOf"):
            for member in schema.get(keyword, ()):
                self._check_circle(member, passed)
        self._in_order.add(id(schema))

    def _target(self, reference: str) -> dict[str, Any]:
        found: Any = self._root
        path = reference.removeprefix("#").removeprefix("/")
        for name in path.split("/") if path else ():
            found = found.get(name) if isinstance(found, dict) else None
        if not reference.startswith("#") or not isinstance(found, dict):
            raise ValueError(f"{reference[:60]!r} leads nowhere; refer to '#/$defs/NAME'")
        return found


def _check_keywords(schema: dict[str, Any]) -> None:
    for keyword, value in schema.items():
        if keyword not in _TAKEN:
            raise ValueError(
                f"the keyword {keyword[:60]!r} is not served; allowed are "
                f"{', '.join(sorted(_TAKEN - _NOTES))}"
            )
        if not _fits(keyword, value):
            raise ValueError(f"{keyword} has a value that it cannot have; change it")
    properties = schema.get("properties", {})
    if lacking := [name for name in schema.get("required", ()) if name not in properties]:
        raise ValueError(f"required names {str(lacking[0])[:60]!r}, which properties lacks; add it")


def _fits(keyword: str, value: Any) -> bool:
    """Whether a keyword's own value is of its kind; schemas inside are looked at elsewhere."""
    if keyword == "type":
        names = value if isinstance(value, list) else [value]
        return bool(names) and all(isinstance(n, str) and n in _TYPES for n in names)
    if keyword in _NUMBERS:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) <= _LARGEST_NUMBER
    if keyword == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if keyword in _SCHEMAS or keyword == "enum":
        return isinstance(value, list) and bool(value)
    if keyword in _NAMED_SCHEMAS:
        return isinstance(value, dict)
    return isinstance(value, str) if keyword == "$ref" else True
