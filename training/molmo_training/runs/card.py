"""A model card beside an export: what the model was trained on, how, and how far it came.

Knows: a run's saved state and log, the front matter that a hub reads. Does not know: weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from molmo_core import __version__
from molmo_core.errors import CheckpointError
from molmo_training.runs.log import read_figures
from molmo_training.runs.meters import RATES
from molmo_training.runs.saved import read_saved
from molmo_training.runs.step_folder import step_of

CARD = "README.md"
DATA_SHARES = "data_shares"
"""Name in a state's progress of the share of each dataset, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    name: str
    step: int
    base_model: str | None = None
    """What it was trained from: a name on a hub."""
    data_shares: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    """Last values of what was logged."""

    def text(self) -> str:
        """The card in Markdown, with the front matter that hubs read."""
        matter: dict[str, Any] = {
            "license": "apache-2.0",
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "tags": ["molmo2"],
        }
        origin = "from nothing"
        if self.base_model is not None:
            matter["base_model"] = self.base_model
            origin = f"from `{self.base_model}`"
        parts = [
            f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n# {self.name}\n",
            f"A Molmo2 trained {origin} for {self.step} steps with molmo-serve {__version__}. "
            "Read by transformers with `trust_remote_code=True`.\n",
        ]
        shares = sorted(self.data_shares.items(), key=lambda item: -item[1])
        tables = (
            ("Data", "dataset | share", [(k, f"{100 * v:.2f} %") for k, v in shares]),
            ("Figures", "figure | last value", [(k, f"{v:.6g}") for k, v in self.figures.items()]),
            ("Settings", "setting | value", list(_flat("", self.settings))),
        )
        parts += [_table(*table) for table in tables if table[2]]
        return "\n".join(parts)


def card_of_run(run: Path, *, name: str, base_model: str | None = None) -> ModelCard:
    """The card of a saved step, or of a run's last one. Raises CheckpointError without either."""
    step = step_of(run)
    run = run if step is None else run.parent
    saved = read_saved(run, step)
    if saved is None:
        raise CheckpointError(
            f"{run.name!r} has no saved state; a card is written of a run of this trainer"
        )
    figures: dict[str, float] = {}
    for line in read_figures(run):
        if line.get("step", saved.step + 1) <= saved.step:
            figures |= {k: v for k, v in line.items() if isinstance(v, int | float)}
    return ModelCard(
        name=name,
        step=saved.step,
        base_model=base_model,
        data_shares=saved.progress.get(DATA_SHARES, {}),
        settings=saved.config,
        figures={k: v for k, v in figures.items() if k not in (*RATES, "step")},
    )


def write_card(folder: Path, card: ModelCard) -> Path:
    """Write the card into an exported folder; returns its file."""
    path = folder / CARD
    path.write_text(card.text())
    return path


def _table(title: str, heads: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"## {title}\n", f"| {heads} |", "|---|---|", *lines, ""])


def _flat(name: str, settings: Any) -> Iterator[tuple[str, str]]:
    """Nested settings under dotted names; a list is one value."""
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(f"{name}.{key}" if name else str(key), value)
    elif name:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        yield name, f"`{text}`".replace("|", "\\|")
