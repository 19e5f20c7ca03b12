"""Small files in the layouts in which datasets lie on disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from molmo_core.clips import sample_clip, write_clip

PICTURE_HW = (30, 60)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*PICTURE_HW, 3), 200, dtype=np.uint8)).save(path, "PNG")
    return path


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*PICTURE_HW, 3), 200, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def video(path: Path) -> Path:
    """Two seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = sample_clip(
        np.random.default_rng(0), max_side_px=170, min_duration_s=2.0, max_duration_s=2.0
    )
    write_clip(clip, path)
    return path


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def hub(
    root: Path, repo: str, rows: Sequence[Mapping[str, Any]], *, at: str = "data/train"
) -> None:
    """A repository as `hf download --local-dir` leaves it."""
    parquet(root / "hub" / repo / f"{at}-00000-of-00001.parquet", rows)


def saved(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Splits as `save_to_disk` of Hugging Face's datasets writes them."""
    for split, rows in splits.items():
        place, name = folder / split, "data-00000-of-00001.arrow"
        place.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([dict(row) for row in rows])
        with (
            pa.OSFile(str(place / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
        state = {"_data_files": [{"filename": name}], "_split": split}
        (place / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def written_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def written_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def pixmo(root: Path, folder: str, rows: Sequence[Mapping[str, Any]], *images: str) -> None:
    """A PixMo table that was made elsewhere, and its pictures here."""
    place = root / "torch_datasets" / "pixmo_datasets" / folder
    saved(place, {"train": rows, "validation": rows[:1]})
    for name in images:
        picture(root / "torch_datasets" / "pixmo_images" / name)
