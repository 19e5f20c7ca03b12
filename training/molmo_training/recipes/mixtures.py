"""The mixtures of the stages, read from `mixtures.toml`.

Knows: the form of that file. Does not know: datasets beyond their names.
Source: mixtures of Molmo2's training.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from molmo_training.data.formatting.formatter import UNCHANGED, LossWeight
from molmo_training.data.mixture import Group, Part
from molmo_training.train_config import DatasetSettings

MIXTURES_FILE = "mixtures.toml"
_OWN_KEYS = {"rate", "datasets", "sizes", "weights", "rates", "loss", "p_high_res", "joins"}


def mixture(name: str) -> tuple[Group, tuple[DatasetSettings, ...]]:
    """The groups of a mixture, and what differs for some of its datasets."""
    text = files("molmo_training").joinpath("recipes", MIXTURES_FILE).read_text()
    table = tomllib.loads(text)[name]
    group = _group(name, {**table, "rate": 1.0})
    return group, tuple(_settings(table, 1.0, 0.0))


def _group(name: str, table: Mapping[str, Any]) -> Group:
    parts: list[Part | Group] = [*_parts(table)]
    for key, inner in _inner(table):
        parts += _parts(inner) if inner.get("joins") else [_group(key, inner)]
    return Group(name=name, parts=tuple(parts), rate=float(table["rate"]))


def _parts(table: Mapping[str, Any]) -> Iterator[Part]:
    for dataset in table.get("datasets", ()):
        yield Part(dataset=dataset)
    for dataset, size in table.get("sizes", {}).items():
        yield Part(dataset=dataset, as_size=size)
    for dataset, weight in table.get("weights", {}).items():
        yield Part(dataset=dataset, weight=weight)
    for dataset, rate in table.get("rates", {}).items():
        yield Part(dataset=dataset, rate=rate)


def _settings(
    table: Mapping[str, Any], loss: float, p_high_res: float
) -> Iterator[DatasetSettings]:
    loss = float(table.get("loss", loss))
    p_high_res = float(table.get("p_high_res", p_high_res))
    names = tuple(part.dataset for part in _parts(table))
    if names and (loss != 1.0 or p_high_res):
        plain = LossWeight(factor=loss, root_subsegments=False, root_length=False)
        weight = UNCHANGED if loss == 1.0 else plain
        yield DatasetSettings(datasets=names, loss=weight, p_high_res=p_high_res)
    for _, inner in _inner(table):
        yield from _settings(inner, loss, p_high_res)


def _inner(table: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(key, value) for key, value in table.items() if key not in _OWN_KEYS]
