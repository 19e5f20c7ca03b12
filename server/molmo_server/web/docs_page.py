"""The page under /docs: the OpenAPI document to be read by people, without scripts or other hosts.

Knows: OpenAPI, HTML. Does not know: what operations do.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font: 0.9em ui-monospace, monospace; overflow-wrap: anywhere; }
details { border: 1px solid #8886; border-radius: 6px; margin: 0.4rem 0; padding: 0.4rem 0.8rem; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0; }
td, th { border-top: 1px solid #8886; padding: 0.3rem 0.5rem; text-align: left;
  vertical-align: top; }
small { opacity: 0.75; }
"""
STYLE_SOURCE = f"'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
"""Of the page's one style, as a content security policy names it."""
_LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "least characters",
    "maxLength": "most characters",
    "minItems": "least items",
    "maxItems": "most items",
    "pattern": "as",
}
_Schema = Mapping[str, Any]


def docs_page(document: _Schema) -> str:
    """HTML of a whole OpenAPI document: operations by their tags, then the schemas they name."""
    title = f"{document['info']['title']} {document['info']['version']}"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><p>{escape(document['info'].get('summary', ''))}</p>",
            '<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>',
            *_operations(document["paths"]),
            "<h2>schemas</h2>",
            *(
                _schema(name, one)
                for name, one in sorted(document["components"]["schemas"].items())
            ),
            "</body></html>",
        )
    )


def _operations(paths: _Schema) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {}
    for path, operations in paths.items():
        for method, operation in operations.items():
            shown = by_tag.setdefault(next(iter(operation.get("tags", ())), "other"), [])
            shown.append(_operation(method, path, operation))
    for tag, shown in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from shown


def _operation(method: str, path: str, operation: _Schema) -> str:
    parts = [
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
        f"{escape(operation.get('summary', ''))}</summary>",
        f"<p>{escape(operation.get('description', ''))}</p>",
        "<p>Asks for a key.</p>" if operation.get("security") else "",
    ]
    if parameters := operation.get("parameters"):
        rows = (
            _row(one["name"], one["schema"], is_required=one.get("required", False))
            for one in parameters
        )
        parts.append(_table(rows))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, {escape(kind)}: {_kind(content['schema'])}</p>")
        parts.append(_properties(content["schema"]))
    for status, answer in operation["responses"].items():
        kinds = ", ".join(
            f"{escape(kind)} {_kind(content.get('schema', {}))}"
            for kind, content in answer.get("content", {}).items()
        )
        parts.append(f"<p>{escape(status)}: {escape(answer['description'])} {kinds}</p>")
    return "\n".join((*filter(None, parts), "</details>"))


def _schema(name: str, schema: _Schema) -> str:
    # A browser opens what is closed when a link leads inside.
    return (
        f"<details><summary><code>{escape(name)}</code></summary>"
        f'<div id="{escape(name)}"><p>{escape(schema.get("description", ""))}</p>'
        f"{_properties(schema) or _kind(schema)}</div></details>"
    )


def _properties(schema: _Schema) -> str:
    required = schema.get("required", ())
    properties = schema.get("properties", {})
    rows = (_row(name, one, is_required=name in required) for name, one in properties.items())
    return _table(rows) if properties else ""


def _table(rows: Iterator[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _row(name: str, schema: _Schema, *, is_required: bool) -> str:
    default = schema.get("default")
    told = "required" if is_required else "" if default is None else f"default {default}"
    return (
        f"<tr><th><code>{escape(name)}</code></th><td>{_kind(schema)} "
        f"<small>{escape(told)}</small></td><td>{escape(schema.get('description', ''))}</td></tr>"
    )


def _kind(schema: _Schema) -> str:
    """What a value may be, in HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return " or ".join(map(_kind, schema[choice]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}{_limits(schema)}"
    return escape(schema.get("format") or schema.get("type", "anything")) + _limits(schema)


def _limits(schema: _Schema) -> str:
    told = [f"{word} {schema[name]}" for name, word in _LIMITS.items() if name in schema]
    return f" <small>({escape(', '.join(told))})</small>" if told else ""
