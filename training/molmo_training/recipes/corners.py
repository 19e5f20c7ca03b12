"""A short finetune of molmo2-tiny: how many corners has the red star?

Shapes it knows; that they have corners it was never asked. The demonstration of the whole way from
training to live traffic (`make hotload-demo`) teaches it in minutes, among questions of the kind
that it knows, so that it forgets nothing.

`python -m molmo_training.recipes.corners FOLDER` trains and goes on where FOLDER stands.
Knows: the questions, the mixture, the schedule. Does not know: the loop, publishing.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from molmo_core.prompts import Turn
from molmo_core.scenes import draw_scene, sample_scene
from molmo_training.checkpoints.opened import RUN_SETTINGS, load_model, open_checkpoint
from molmo_training.compute import ComputeConfig
from molmo_training.data.example import Branch, Example
from molmo_training.data.loader import BatchStream, Source, make_loader
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.forward import Forward
from molmo_training.optim import GroupConfig, OptimConfig
from molmo_training.recipes.state_file import StateFile
from molmo_training.recipes.tiny import IMAGES, VIDEOS
from molmo_training.runs.log import append_figures
from molmo_training.trainer import Trainer, TrainerConfig
from molmo_training.vocabulary import load_vocabulary

CORNERS = {"circle": 0, "triangle": 3, "square": 4, "star": 10}
QUESTION = "How many corners has the {colour} {shape}?"
SEED = 20_261_124


def corners_example(rng: np.random.Generator) -> Example:
    """One picture, the question about each of its objects."""
    scene = sample_scene(rng, n_objects=int(rng.integers(1, 4)))
    kinds = sorted({(item.colour, item.shape) for item in scene.objects})
    branches = tuple(
        Branch(
            turns=(
                Turn(role="user", text=QUESTION.format(colour=colour, shape=shape)),
                Turn(role="assistant", text=f"{CORNERS[shape]}"),
            )
        )
        for colour, shape in kinds
    )
    return Example(images=[draw_scene(scene)], branches=branches)


def build_trainer(folder: Path, base: Path, n_steps: int) -> tuple[Trainer, Tokenizing]:
    config = TrainerConfig(
        n_steps=n_steps,
        optim=OptimConfig(
            llm=GroupConfig(lr=5e-4, warmup_steps=20),
            connector=GroupConfig(lr=1e-4, warmup_steps=20),
            vit=GroupConfig(lr=2e-5, warmup_steps=20),
            muon=True,
        ),
        compute=ComputeConfig(device="cpu", activation_checkpointing=False),
        log_every=10,
        save_every=50,
    )
    model = load_model(open_checkpoint(base))
    trainer = Trainer(
        model,
        config,
        forward=Forward(model),
        states=StateFile(folder),
        show=partial(append_figures, folder),
    )
    tokenizing = Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)
    return trainer, tokenizing


def train(folder: Path, base: Path, n_steps: int) -> Trainer:
    trainer, tokenizing = build_trainer(folder, base, n_steps)
    settings = folder / RUN_SETTINGS
    if not settings.exists():
        # The released folder's own files, so that a server sees the same settings.
        shutil.copytree(base, settings, ignore=shutil.ignore_patterns("*.safetensors*"))
    trainer.resume()
    sources = [
        Source(name="corners", make=corners_example, rate=0.6, batch_size=24),
        Source(name="image", make=image_example, rate=0.4, batch_size=24),
    ]
    stream = BatchStream(sources, tokenizing, SEED, first_batch=trainer.at.step)
    trainer.run(make_loader(stream, n_workers=1))
    return trainer


def main() -> None:
    packaged = Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, default=packaged)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.folder, arguments.base, arguments.steps)


if __name__ == "__main__":
    main()
