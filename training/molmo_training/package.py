"""From a run folder of molmo2-tiny to the checkpoint folder that ships.

`python -m molmo_training.package RUN_FOLDER OUT`. The weights are stored in bfloat16, which
halves the download; the config tells readers to compute in float32, as CPUs do best.

Knows: what a run folder holds, the one recipe. Does not know: the layout of a checkpoint
(`molmo_hf.export`), how good the weights are.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import torch

from molmo_core.errors import CheckpointError
from molmo_hf.export import save_checkpoint
from molmo_training.recipes.tiny import IMAGES, VIDEOS, tiny_config
from molmo_training.run_log import LOG_FILE
from molmo_training.vocabulary import load_vocabulary

logger = logging.getLogger(__name__)

TRAINING_LOG = "training_log.jsonl"


def package(folder: Path, out: Path) -> Path:
    """Write the weights of run `folder` as the Hugging Face folder `out` and return it.

    The run may still go on: its state file is replaced as a whole, so that a complete one is read.
    Raises CheckpointError when the run has no state yet, or `out` is not empty.
    """
    path = folder / "state.pt"
    if not path.exists():
        raise CheckpointError(
            f"the run {folder.name!r} has no state.pt; expected the folder of a run that has saved "
            "at least once: let it train on"
        )
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    save_checkpoint(
        state["model"],
        out,
        config=tiny_config(),
        tokenizer=load_vocabulary().for_transformers(),
        images=IMAGES,
        videos=VIDEOS,
        dtype=torch.bfloat16,
        compute_dtype=torch.float32,
        with_code=True,
    )
    log = folder / LOG_FILE
    if log.exists():
        shutil.copyfile(log, out / TRAINING_LOG)
    logger.info("step %d of %s is packaged", state["step"], folder.name)
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
