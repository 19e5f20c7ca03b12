"""Reading the fields of a dataset's row, each with an error that names the field.

A row is a mapping, as JSONL, Parquet or a Hugging Face dataset gives it. None counts as absent.
Knows: types of fields. Does not know: what a style needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from molmo_core.errors import InvalidExample

Row = Mapping[str, Any]
XY = tuple[float, float]

_LARGEST = 1e15


def invalid(row: Row, field: str, wanted: str) -> InvalidExample:
    """The error for a field that is missing or of the wrong kind."""
    got = "is missing" if row.get(field) is None else f"is {shortened(row[field])}"
    style = row.get("style")
    return InvalidExample(f"field {field!r} of a row of style {style!r} {got}; give {wanted}")


def shortened(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def optional_text(row: Row, field: str) -> str | None:
    value = row.get(field)
    if value is None or isinstance(value, str):
        return value
    raise invalid(row, field, "a text")


def text(row: Row, field: str) -> str:
    value = optional_text(row, field)
    if value is None:
        raise invalid(row, field, "a text")
    return value


def optional_number(row: Row, field: str) -> float | None:
    value: Any = row.get(field)
    if value is None:
        return None
    if not _is_number(value):
        raise invalid(row, field, "a finite number")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is a number of a size that means something; NaN compares with nothing."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and -_LARGEST < value < _LARGEST


def number(row: Row, field: str) -> float:
    value = optional_number(row, field)
    if value is None:
        raise invalid(row, field, "a finite number")
    return value


def flag(row: Row, field: str) -> bool:
    value = row.get(field)
    if value is None or isinstance(value, bool | np.bool_):
        return bool(value)
    raise invalid(row, field, "true or false")


def items(row: Row, field: str) -> Sequence[Any]:
    """A list; arrays of Parquet and tuples count as lists."""
    value = row.get(field)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    raise invalid(row, field, "a list")


def rows(row: Row, field: str) -> list[Row]:
    """A list of mappings."""
    found = items(row, field)
    if not all(isinstance(item, Mapping) for item in found):
        raise invalid(row, field, "a list of objects")
    return list(found)


def texts(row: Row, field: str) -> list[str]:
    """A list of texts; numbers are written out."""
    found = items(row, field)
    if not all(isinstance(item, str | Real) for item in found):
        raise invalid(row, field, "a list of texts")
    return [str(item) for item in found]


def xys(row: Row, field: str) -> list[XY]:
    """A list of [x, y], or of objects with x and y."""
    return [xy_of(row, field, item) for item in items(row, field)]


def xy_of(row: Row, field: str, value: Any) -> XY:
    pair: Any = [value.get("x"), value.get("y")] if isinstance(value, Mapping) else value
    if isinstance(pair, np.ndarray):
        pair = pair.tolist()
    is_pair = isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_number, pair))
    if not is_pair:
        raise invalid(row, field, "points as [x, y] or {x, y}")
    return float(pair[0]), float(pair[1])
