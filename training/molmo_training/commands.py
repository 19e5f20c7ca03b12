"""`molmo train`: run a recipe, or tell what it would do.

Knows: options, recipes by name, what is said. Does not know: how it is done (`launch`).
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from molmo_core.errors import TrainingError
from molmo_training.launch.dry_run import report
from molmo_training.launch.overrides import overridden
from molmo_training.launch.plan import Plan
from molmo_training.launch.running import train
from molmo_training.prepare.commands import prepare_command
from molmo_training.recipes.finetune import finetune, finetune_lora, with_own_data
from molmo_training.recipes.long_context import long_context, long_context_debug
from molmo_training.recipes.pretrain import pretrain, pretrain_debug
from molmo_training.recipes.sft import sft, sft_debug
from molmo_training.recipes.tiny import corners, tiny, tiny_few, tiny_one, tiny_several
from molmo_training.train_config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "pretrain": pretrain,
    "sft": sft,
    "long-context": long_context,
    "finetune": finetune,
    "finetune-lora": finetune_lora,
    "pretrain-debug": pretrain_debug,
    "sft-debug": sft_debug,
    "long-context-debug": long_context_debug,
    "tiny-one": tiny_one,
    "tiny-few": tiny_few,
    "tiny": tiny,
    "tiny-several": tiny_several,
    "corners": corners,
}
_FROM_NOTHING = ("pretrain-debug",)

app = App(
    name="molmo train",
    help="Train Molmo2: the released stages, small variants of them, your own data.",
    version_flags=(),
)
app.command(prepare_command, name="prepare")


@app.default
def train_command(
    recipe: Annotated[str, Parameter(help=f"One of {', '.join(RECIPES)}")],
    /,
    *,
    set_: Annotated[
        tuple[str, ...],
        Parameter(
            name="--set", negative=(), help="A setting by its name, such as optim.llm.lr=2e-5"
        ),
    ] = (),
    run: Annotated[
        Path | None,
        # torchrun takes a `--run` behind the program's name for an abbreviation of its own option.
        Parameter(name=("--run", "--folder"), help="Folder of the run; else runs/RECIPE"),
    ] = None,
    init: Annotated[
        Path | None, Parameter(help="Checkpoint of any form to start from; else model.start")
    ] = None,
    data: Annotated[
        tuple[Path, ...], Parameter(negative=(), help="Your own files, in the place of the mixture")
    ] = (),
    held_out: Annotated[
        tuple[Path, ...], Parameter(negative=(), help="Your own files whose loss is only looked at")
    ] = (),
    allow_absolute: Annotated[
        bool, Parameter(negative=(), help="Your own files may name media outside of their folder")
    ] = False,
    time_limit: Annotated[
        float | None, Parameter(help="Seconds after which to save and end, to go on later")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Tell shares, tokens, parameters and memory; no weights")
    ] = False,
    print_config: Annotated[
        bool, Parameter(negative=(), help="Tell all settings as JSON and end")
    ] = False,
) -> None:
    """Run RECIPE, or go on with it where its folder stands.

    Started by torchrun it uses all its processes. A run that gets SIGTERM saves its state and ends
    with code 0.
    """
    given = {
        "data.allow_absolute": "true" if allow_absolute else None,
        "saving.time_limit_s": time_limit,
    }
    named = tuple(f"{name}={value}" for name, value in given.items() if value is not None)
    config = configured(recipe, (*set_, *named), init=init, data=data, held_out=held_out)
    if print_config:
        _say(json.dumps(config.document(), indent=2))
        return
    plan = Plan(config)
    if dry_run:
        _say(report(plan, n_ranks=int(os.environ.get("WORLD_SIZE", "1"))))
        return
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", stream=sys.stderr)
    folder = run or Path("runs") / recipe
    trainer = train(plan, folder)
    if is_first:
        _say(f"{folder}: step {trainer.at.step:,} of {config.n_steps:,}")


def configured(
    recipe: str,
    assignments: tuple[str, ...] = (),
    *,
    init: Path | None = None,
    data: tuple[Path, ...] = (),
    held_out: tuple[Path, ...] = (),
) -> TrainConfig:
    """The settings of a recipe as the command line changes them. Raises MolmoError."""
    if recipe not in RECIPES:
        near = _near(recipe)
        meant = f" did you mean {' or '.join(near)}?" if near else ""
        raise TrainingError(f"there is no recipe {recipe};{meant} there are {', '.join(RECIPES)}")
    config = RECIPES[recipe]()
    if data or held_out:
        config = with_own_data(config, data, held_out)
    assignments = assignments if init is None else (*assignments, f"model.start={init}")
    config = overridden(config, assignments)
    if config.model.start is None and recipe not in _FROM_NOTHING:
        raise TrainingError(
            f"{recipe} starts from a checkpoint; name its folder with --init (`molmo train "
            "prepare` makes one of pretrained models)"
        )
    if not config.data.mixture.parts:
        raise TrainingError(f"{recipe} trains on your own data; name its files with --data")
    return config


def _near(recipe: str) -> list[str]:
    """Recipes of the same words in another order or joined otherwise, or of nearly the same."""

    def in_order(name: str) -> str:
        return "-".join(sorted(re.split(r"[^a-z0-9]+", name.lower())))

    named = {in_order(name): name for name in RECIPES}
    if in_order(recipe) in named:
        return [named[in_order(recipe)]]
    return [named[n] for n in difflib.get_close_matches(in_order(recipe), named, n=2)]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
