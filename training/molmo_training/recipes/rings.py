"""Pictures of a kind that molmo2-tiny was never shown, as a user's own data: rings.

`python -m molmo_training.recipes.rings FOLDER` writes `train.jsonl`, `held_out.jsonl` and the
pictures beside them. Rings lie among the shapes that the model knows, which it is not to point at.
Knows: how they are drawn and written. Does not know: training.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from molmo_core.scenes import draw_scene, sample_scene

INKS = {"black": (16, 16, 16), "white": (246, 246, 246)}
LABELS = ("ring", "rings", "all rings")
MOST_RINGS, MOST_SHAPES, MAX_SIDE_PX = 4, 3, 512
_RADIUS_SHARE, _WIDTH_SHARE, _GAP = (0.06, 0.12), 0.35, 1.15
_SEEDS = {"train": 41, "held_out": 42}


def draw_rings(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[float, float]]]:
    """A picture of some rings and shapes, and the centres of the rings in pixels."""
    n_rings, n_shapes = int(rng.integers(1, MOST_RINGS + 1)), int(rng.integers(0, MOST_SHAPES + 1))
    scene = sample_scene(rng, n_objects=n_shapes, max_side_px=MAX_SIDE_PX)
    taken = [(item.x_px, item.y_px, item.radius_px) for item in scene.objects]
    image = Image.fromarray(draw_scene(scene))
    pen = ImageDraw.Draw(image)
    centres: list[tuple[float, float]] = []
    shorter_px = min(image.size)
    while len(centres) < n_rings:
        radius = rng.uniform(*_RADIUS_SHARE) * shorter_px
        x, y = (float(rng.uniform(radius, side - radius)) for side in image.size)
        if any(math.hypot(x - x2, y - y2) < _GAP * (radius + r2) for x2, y2, r2 in taken):
            continue
        ink = tuple(INKS.values())[int(rng.integers(len(INKS)))]
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, outline=ink, width=max(round(_WIDTH_SHARE * radius), 2))
        taken.append((x, y, radius))
        centres.append((x, y))
    return image, centres


def write_rings(folder: Path, n_train: int, n_held_out: int) -> None:
    """Two files of rows; no picture is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", n_train), ("held_out", n_held_out)):
        rows = []
        for index in range(n):
            rng = np.random.default_rng([_SEEDS[name], index])
            image, centres = draw_rings(rng)
            file = f"{name}-{index:04d}.png"
            image.save(folder / file)
            points = [[round(x, 1), round(y, 1)] for x, y in centres]
            label = LABELS[int(rng.integers(len(LABELS)))] if name == "train" else LABELS[1]
            rows.append({"image": file, "label": label, "points": points})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100)
    arguments = parser.parse_args()
    write_rings(arguments.folder, arguments.train, arguments.held_out)


if __name__ == "__main__":
    main()
