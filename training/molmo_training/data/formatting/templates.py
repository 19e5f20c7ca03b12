"""Prompt templates: sentences with slots, kept in the TOML files beside this module.

A group holds sentences with the same slots. `video_of` makes a group of another by naming a
video where that names a picture, `seconds_of` by saying which unit its moments have.
Knows: where templates are and how one is drawn and filled. Does not know: styles, datasets.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

import numpy as np

_FOLDER = files("molmo_training.data.formatting") / "templates"
GROUP_FILES = ("points", "multi_image", "captions", "moments", "answers", "tracks")
_PICTURE = re.compile(r"\b(?:image|picture|photo)\b")
_MOMENT = re.compile(r"\{(?:start|end|time)\}")


def load_table(name: str) -> dict[str, Any]:
    """The content of one TOML file of the templates."""
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def template_groups() -> dict[str, tuple[str, ...]]:
    """Every group by its name. Raises ValueError when the sentences of one differ in slots."""
    tables = {name: group for file in GROUP_FILES for name, group in load_table(file).items()}
    groups = {name: _resolved(group, tables) for name, group in tables.items()}
    for name, templates in groups.items():
        if len({slots_of(template) for template in templates}) != 1:
            raise ValueError(f"templates of {name!r} have different slots: give all the same")
    return groups


def _resolved(group: dict[str, Any], tables: dict[str, Any]) -> tuple[str, ...]:
    if "video_of" in group:
        return tuple(_PICTURE.sub("video", t) for t in _resolved(tables[group["video_of"]], tables))
    if "seconds_of" in group:
        parent = _resolved(tables[group["seconds_of"]], tables)
        return tuple(_MOMENT.sub(lambda slot: f"{slot.group()} seconds", t) for t in parent)
    return tuple(group["templates"])


def slots_of(template: str) -> frozenset[str]:
    return frozenset(slot for _, slot, _, _ in Formatter().parse(template) if slot is not None)


def fill_template(group: str, rng: np.random.Generator, **slots: str) -> str:
    """A sentence of the group, drawn evenly, with its slots filled."""
    templates = template_groups()[group]
    return templates[int(rng.integers(len(templates)))].format(**slots)
