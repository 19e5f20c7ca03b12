"""`--set a.b=c`: fields of nested settings by their names, typed and checked.

`c` is JSON or a plain word; several items may be written with commas. In a tuple of things that
have names (parts of a mixture) the name stands for the place.
Knows: dataclasses and their annotations. Does not know: what is set.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from molmo_core.errors import MolmoError, TrainingError

T = TypeVar("T")


def overridden(settings: T, assignments: Iterable[str]) -> T:
    """The settings with the assignments made, in order; raises TrainingError for a wrong one."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise TrainingError(
                f"--set {assignment!r} is no assignment; write name=value, such as n_steps=100"
            )
        settings = _with(settings, path.strip().split("."), text.strip(), path.strip())
    return settings


def _with(value: Any, names: Sequence[str], text: str, path: str) -> Any:
    """`value` with what `names` lead to set; `path` is the whole assignment's, for messages."""
    name, rest = names[0], names[1:]
    if isinstance(value, tuple):
        place = _place(value, name, path)
        changed = _with(value[place], rest, text, path) if rest else None
        if changed is None:
            raise TrainingError(f"{path} is one of several things; set a field of it, or all")
        return (*value[:place], changed, *value[place + 1 :])
    if not is_dataclass(value) or isinstance(value, type):
        raise TrainingError(f"{path}: there is nothing in {value!r} to be set by a name")
    own = {field.name for field in fields(value)}
    if name in own:
        return _with_field(value, name, rest, text, path)
    named = next((n for n in own if _names(getattr(value, n))), None)
    if named is not None and name in _names(getattr(value, named)):
        return replace(value, **{named: _with(getattr(value, named), names, text, path)})
    near = difflib.get_close_matches(path, list(_paths(value, path, names)), n=3, cutoff=0.5)
    raise TrainingError(
        f"there is no setting {path}; near are {', '.join(near)}"
        if near
        else f"there is no setting {path}; in its place are {', '.join(sorted(own))}"
    )


def _with_field(value: Any, name: str, rest: Sequence[str], text: str, path: str) -> Any:
    annotation = get_type_hints(type(value))[name]
    if rest:
        inner = getattr(value, name)
        if inner is None and (default := _default_of(annotation)) is not None:
            inner = default
        changed = _with(inner, rest, text, path)
    else:
        changed = _converted(text, annotation, path)
    try:
        return replace(value, **{name: changed})
    except (ValueError, MolmoError) as error:
        raise TrainingError(f"{path}={text}: {error}") from error


def _default_of(annotation: Any) -> Any:
    """The settings that an optional field would have, all at their defaults."""
    for part in get_args(annotation):
        if is_dataclass(part) and isinstance(part, type):
            try:
                return part()
            except TypeError:  # some of its fields have no default
                return None
    return None


def _converted(text: str, annotation: Any, path: str) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except PydanticUserError as error:
        raise TrainingError(f"{path} cannot be set from text; change the recipe") from error
    for document in _readings(text):
        try:
            return adapter.validate_json(document, strict=True)
        except ValidationError:
            continue
    raise TrainingError(f"{path} cannot be {text!r}; allowed is {_spelt(annotation)}")


def _readings(text: str) -> Iterator[str]:
    """What a text may mean, as JSON: itself, a word, items."""
    words = {"None": "null", "none": "null", "True": "true", "False": "false"}
    yield words.get(text, text)
    yield json.dumps(text)
    items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
    yield "[" + ", ".join(_item(item) for item in items) + "]"
    yield json.dumps(items)


def _item(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text)
    return text


def _spelt(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(part) for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_spelt(part) for part in parts)
    if origin is tuple:
        items = [part for part in parts if part is not Ellipsis]
        return "items with commas: " + ", ".join(_spelt(part) for part in items)
    names = {
        NoneType: "None",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return names.get(annotation, f"JSON of {getattr(annotation, '__name__', annotation)}")


def _names(value: Any) -> list[str]:
    """Names of the items of a tuple, where they have some."""
    if not isinstance(value, tuple):
        return []
    found = [getattr(item, "name", None) or getattr(item, "dataset", None) for item in value]
    return [name for name in found if isinstance(name, str)]


def _place(items: tuple[Any, ...], name: str, path: str) -> int:
    names = _names(items)
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    near = difflib.get_close_matches(name, names, n=3) or names
    raise TrainingError(
        f"{path}: there is no {name}; there are {', '.join(near) or f'{len(items)} items'}"
    )


def _paths(value: Any, path: str, names: Sequence[str]) -> Iterator[str]:
    """Paths of all settings below `value`, which stands where `names` begin in `path`."""
    known = path.split(".")[: len(path.split(".")) - len(names)]
    for name in _leaves(value):
        yield ".".join([*known, name])


def _leaves(value: Any) -> Iterator[str]:
    for field in fields(value):
        inner = getattr(value, field.name)
        yield field.name
        if is_dataclass(inner) and not isinstance(inner, type):
            yield from (f"{field.name}.{name}" for name in _leaves(inner))
