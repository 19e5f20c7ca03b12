"""Files of a user: drawn pictures, a short video, rows; and molmo2-tiny's view of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_core.clips import sample_clip, write_clip
from molmo_training.data.own.model_view import ModelView, open_model_view
from molmo_training.data.packing import Budgets
from molmo_training.recipes.finetune import finetune

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def view() -> ModelView:
    return view_of(n_tokens=16_384, n_crops=128)


def view_of(*, n_tokens: int, n_crops: int) -> ModelView:
    budgets = Budgets(n_tokens=n_tokens, n_crops=n_crops)
    return open_model_view(replace(finetune().data, budgets=budgets))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    drawn = sample_clip(np.random.default_rng(3), min_duration_s=2, max_duration_s=3)
    write_clip(drawn, path)
    return path


@pytest.fixture
def write_rows(tmp_path: Path, clip: Path) -> WriteRows:
    """Writes rows as JSONL, and a file for each picture and video that they name."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        for row in rows:
            named = [row.get("image"), row.get("video"), *(row.get("images") or ())]
            for medium in (path for path in named if isinstance(path, str)):
                path = tmp_path / medium
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".mp4":
                    shutil.copy(clip, path)
                elif not path.exists():
                    form = Image.registered_extensions().get(path.suffix, "PNG")
                    Image.fromarray(picture(640, 480)).save(path, form)
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


def picture(width_px: int, height_px: int) -> np.ndarray[Any, Any]:
    """A gradient, so that a cut file or a turned picture shows."""
    down, across = np.mgrid[0:height_px, 0:width_px]
    return np.stack([down % 256, across % 256, (down + across) % 256], axis=-1).astype(np.uint8)
