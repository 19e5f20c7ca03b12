"""`molmo data`: check files of training data, and show them as the model sees them.

Knows: options, what is told on a terminal, exit codes. Does not know: what is checked or drawn.
"""

from __future__ import annotations

import json as json_format
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from molmo_core.errors import DataError
from molmo_training.data.own.check import check_tables, mixture_of
from molmo_training.data.own.model_view import ModelView, open_model_view
from molmo_training.data.own.of_run import viewer_of_files, viewer_of_recipe
from molmo_training.data.own.page.page import render_page
from molmo_training.data.own.table import open_tables
from molmo_training.data.packing import Budgets
from molmo_training.datasets.commands import list_command
from molmo_training.recipes.finetune import finetune

app = App(
    name="molmo data",
    help="Check and show training data of your own; list the datasets by name.",
    version_flags=(),
)
app.command(list_command, name="list")

_SETTINGS = finetune().data
"""What is seen is what `molmo train finetune` makes of the rows."""

Files = Annotated[
    list[Path], Parameter(help="JSONL or Parquet, or folders of Parquet or Hugging Face's datasets")
]
Checkpoint = Annotated[
    Path | None, Parameter(help="Whose tokenizer and geometry; else those of molmo2-tiny")
]
Tokens = Annotated[int, Parameter(help="Of a pack", validator=Number(gte=1))]
Crops = Annotated[int, Parameter(help="Of a pack, frames among them", validator=Number(gte=1))]
Rates = Annotated[
    list[float] | None,
    Parameter(name="--rate", help="How often each file is drawn; else by the roots of their sizes"),
]
AllowAbsolute = Annotated[
    bool, Parameter(negative=(), help="Media may lie outside the folder of the data")
]
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


@app.command(name="check")
def check_command(
    files: Files,
    /,
    *,
    checkpoint: Checkpoint = None,
    tokens: Tokens = _SETTINGS.budgets.n_tokens,
    crops: Crops = _SETTINGS.budgets.n_crops,
    rates: Rates = None,
    allow_absolute: AllowAbsolute = False,
    decode: Annotated[
        bool, Parameter(negative=(), help="Open every picture and video whole, not its header only")
    ] = False,
    show: Annotated[int, Parameter(help="Findings of each kind", validator=Number(gte=1))] = 5,
    jobs: Annotated[
        int | None, Parameter(help="Processes; else one for each core", validator=Number(gte=1))
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON")] = False,
) -> int:
    """Fields, media, points, lengths and shares of FILES; exit code 1 when something was found."""
    tables = open_tables(files, allow_absolute=allow_absolute)
    report = check_tables(
        tables,
        _view(checkpoint, tokens, crops),
        mixture=mixture_of(tables, rates),
        n_shown=show,
        n_jobs=jobs or len(os.sched_getaffinity(0)),
        opens_media=decode,
        on_progress=_tell if sys.stderr.isatty() else None,
    )
    if json:
        _say(json_format.dumps(report.as_dict(), indent=2))
    else:
        _say(report.as_text().translate(_CONTROL))
    return 1 if report.n_findings else 0


@app.command(name="view")
def view_command(
    *files: Annotated[Path, Parameter(help="As for check; none with --recipe")],
    out: Annotated[Path, Parameter(help="The page, one HTML file")],
    recipe: Annotated[
        str | None, Parameter(help="The mixture of `molmo train RECIPE`, with its settings")
    ] = None,
    n: Annotated[
        int | None, Parameter(help="Examples, else 20; packs, else 3", validator=Number(gte=1))
    ] = None,
    in_order: Annotated[
        bool, Parameter(negative=(), help="As the files have them; else drawn as in training")
    ] = False,
    start: Annotated[int, Parameter(help="First example, from 0", validator=Number(gte=0))] = 0,
    packed: Annotated[
        bool, Parameter(negative=(), help="Whole packs, not single examples")
    ] = False,
    checkpoint: Checkpoint = None,
    tokens: Tokens = _SETTINGS.budgets.n_tokens,
    crops: Crops = _SETTINGS.budgets.n_crops,
    rates: Rates = None,
    seed: Annotated[int | None, Parameter(help="Of all that is drawn; else the run's")] = None,
    allow_absolute: AllowAbsolute = False,
) -> None:
    """Write examples or packs as a page: media, tokens, loss weights, who sees whom."""
    if packed and (in_order or start):
        raise DataError("packs are drawn as in training: leave out --in-order and --start")
    if bool(files) == (recipe is not None):
        raise DataError("a page is of files or of a recipe: give FILES, or --recipe NAME")
    if recipe is not None:
        viewer = viewer_of_recipe(recipe, checkpoint, seed)
    else:
        tables = open_tables(list(files), allow_absolute=allow_absolute)
        view = _view(checkpoint, tokens, crops)
        viewer = viewer_of_files(tables, view, _SETTINGS, mixture_of(tables, rates), seed)
    if packed:
        page = viewer.packs(n or 3)
    else:
        page = viewer.examples(n or 20, start=start, in_order=in_order)
    try:
        out.write_text(render_page(page), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    _say(str(out))


def _view(checkpoint: Path | None, n_tokens: int, n_crops: int) -> ModelView:
    budgets = Budgets(n_tokens=n_tokens, n_crops=n_crops)
    return open_model_view(replace(_SETTINGS, budgets=budgets), checkpoint)


def _tell(name: str, n_done: int, n_rows: int) -> None:
    sys.stderr.write(f"molmo: {name}: {n_done:,} of {n_rows:,} rows\n")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
