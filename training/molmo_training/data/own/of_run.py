"""Viewers of runs: of a user's files with some settings, or of a recipe with all its datasets.

Knows: recipes and their plans. Does not know: pages, options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from molmo_training.commands import configured
from molmo_training.data.formatting import Formatter
from molmo_training.data.lanes import StreamConfig
from molmo_training.data.mixture import Group
from molmo_training.data.own.model_view import ModelView, packaged_checkpoint, visual_ids_of
from molmo_training.data.own.table import OwnTable
from molmo_training.data.own.view import Viewer
from molmo_training.data.rows import FormattedRows
from molmo_training.launch.plan import Plan
from molmo_training.train_config import DataConfig


def viewer_of_files(
    tables: Sequence[OwnTable],
    view: ModelView,
    settings: DataConfig,
    mixture: Group,
    seed: int | None = None,
) -> Viewer:
    """Of files, in a run with these settings."""
    return Viewer(
        sources={table.name: view.rows(table) for table in tables},
        view=view,
        stream=StreamConfig(
            mixture=mixture,
            budgets=view.budgets,
            n_lanes=settings.packs_per_step,
            buffer_size=settings.buffer_size,
            seed=settings.seed if seed is None else seed,
        ),
    )


def viewer_of_recipe(recipe: str, checkpoint: Path | None, seed: int | None = None) -> Viewer:
    """Of a recipe, as `molmo train` would run it. Raises MolmoError for what that refuses."""
    start = checkpoint or packaged_checkpoint()
    plan = Plan(configured(recipe, init=start))
    data, model = plan.config.data, plan.start
    view = ModelView(
        name=f"{start.name} in {recipe}",
        tokenizer=model.tokenizer,
        tokenizing=plan.tokenizing,
        formatter=Formatter(settings=data.format),
        media=data.media,
        budgets=data.budgets,
        visual_ids=visual_ids_of(model.config),
    )
    sources = {
        name: source for name, source in plan.sources.items() if isinstance(source, FormattedRows)
    }
    stream = plan.stream_config if seed is None else replace(plan.stream_config, seed=seed)
    return Viewer(sources=sources, view=view, stream=stream)
