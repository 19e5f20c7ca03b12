"""From a run folder of molmo2-tiny to the checkpoint folder that ships.

`python -m molmo_training.package RUN_FOLDER OUT`. The weights are stored in bfloat16, which
halves the download; the config tells readers to compute in float32, as CPUs do best. The log of
the training and the model card come along.

Knows: what goes with the weights. Does not know: forms and layouts (`checkpoints`), how good the
weights are.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from importlib.resources import files
from pathlib import Path

import torch

from molmo_training.checkpoints.convert import to_hugging_face
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.runs.log import LOG_FILE

logger = logging.getLogger(__name__)

TRAINING_LOG = "training_log.jsonl"
CARD, CARD_SOURCE = "README.md", "molmo2_tiny_card.md"


def package(folder: Path, out: Path) -> Path:
    """Write the weights of run `folder` as the Hugging Face folder `out` and return it.

    The run may still go on: its state file is replaced as a whole, so that a complete one is read.
    Raises CheckpointError when the run has not saved yet, or `out` is not empty.
    """
    opened = open_checkpoint(folder)
    to_hugging_face(opened, out, dtype=torch.bfloat16, compute_dtype=torch.float32)
    log = folder / LOG_FILE
    if log.exists():
        shutil.copyfile(log, out / TRAINING_LOG)
    card = files("molmo_training").joinpath("recipes", CARD_SOURCE).read_text()
    (out / CARD).write_text(card)
    logger.info("%s is packaged", folder.name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    package(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
