"""`molmo train prepare`: pretrained models as starting weights.

Knows: options and what is said. Does not know: models.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from molmo_core.errors import CheckpointError
from molmo_training.checkpoints.opened import n_parameters, open_checkpoint
from molmo_training.prepare.initial import VIT_LAYERS, build_initial
from molmo_training.prepare.parts import LlmPart, VitPart, open_part, write_part
from molmo_training.prepare.sources import PRETRAINED

DEFAULT_FOLDER = Path("starting-weights")


def prepare_command(
    name: Annotated[
        str, Parameter(help=f"One of {', '.join(PRETRAINED)}; a folder, or a hub's owner/name")
    ],
    /,
    *,
    from_: Annotated[
        str | None, Parameter(name="--from", help="Folder or owner/name to read NAME from")
    ] = None,
    vit: Annotated[
        str | None,
        Parameter(help="A vision tower for the language model NAME: writes a complete Molmo2"),
    ] = None,
    vit_from: Annotated[str | None, Parameter(help="Folder or owner/name of the tower")] = None,
    out: Annotated[Path | None, Parameter(help=f"New folder; else {DEFAULT_FOLDER}/NAME")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(help="Of the weights")] = "float32",
    crop_px: Annotated[int | None, Parameter(help="Side of the crops that the tower sees")] = None,
    vit_layers: Annotated[
        tuple[int, ...], Parameter(negative=(), help="Layers of the tower that are read")
    ] = VIT_LAYERS,
    seed: Annotated[int, Parameter(help="Of what is drawn: connector and new tokens")] = 0,
) -> None:
    """Turn pretrained models into starting weights.

    NAME alone becomes a part; a language model with --vit becomes a checkpoint that is trained,
    served and published like any other.
    """
    chosen: torch.dtype = getattr(torch, dtype)
    if vit is None:
        if vit_from is not None:
            raise CheckpointError("--vit-from names where a tower is; say which with --vit")
        part = open_part(name, source=from_, input_px=crop_px)
        folder = write_part(part, out or DEFAULT_FOLDER / Path(name).name, dtype=chosen)
        _say(f"{folder} holds {name}, {n_parameters(part.weights.shapes()):,} parameters")
        return
    decoder = open_part(name, source=from_)
    tower = open_part(vit, source=vit_from, input_px=crop_px)
    if not isinstance(decoder, LlmPart) or not isinstance(tower, VitPart):
        raise CheckpointError(
            f"a language model is to come first and a tower after --vit; got {name!r} and {vit!r}"
        )
    folder = out or DEFAULT_FOLDER / f"{Path(name).name}-{Path(vit).name}"
    build_initial(decoder, tower, folder, vit_layers=vit_layers, dtype=chosen, seed=seed)
    n_all = n_parameters(open_checkpoint(folder).weights.shapes())
    _say(f"{folder} holds a Molmo2 of {name} and {vit}, {n_all:,} parameters")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
