"""Where pretrained models are: names of known ones, folders, a hub; opened as config and weights.

Only numbers and JSON are read: safetensors, or one `pytorch_model.bin` with nothing but tensors.

Knows: the names, what to fetch. Does not know: what the tensors mean (`llms`, `vits`).
"""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from transformers import AutoConfig

from molmo_core.errors import CheckpointError
from molmo_hf.weight_files import LoadedWeights, Weights
from molmo_training.checkpoints.safetensors_weights import SafetensorsWeights
from molmo_training.checkpoints.wording import first_line

logger = logging.getLogger(__name__)

PICKLED = "pytorch_model.bin"
UNUSABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What numbers of a configuration cause that are missing or of which no model can be made."""
_SETTINGS = ("*.json", "*.txt", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model that Molmo2's training knows by name."""

    kind: Literal["llm", "vit"]
    hub: str
    input_px: int | None = None
    """Side of the crops that the tower is to see; None: what it was trained on."""
    n_layers: int | None = None
    """Layers kept; None: all."""


PRETRAINED: dict[str, Pretrained] = {
    "qwen3_0.6b": Pretrained(kind="llm", hub="Qwen/Qwen3-0.6B"),
    "qwen3_4b": Pretrained(kind="llm", hub="Qwen/Qwen3-4B"),
    "qwen3_4b_instruct": Pretrained(kind="llm", hub="Qwen/Qwen3-4B-Instruct-2507"),
    "qwen3_8b_base": Pretrained(kind="llm", hub="Qwen/Qwen3-8B-Base"),
    "qwen3_8b": Pretrained(kind="llm", hub="Qwen/Qwen3-8B"),
    "olmo3_7b_instruct": Pretrained(kind="llm", hub="allenai/Olmo-3-7B-Instruct"),
    "siglip": Pretrained(kind="vit", hub="google/siglip-so400m-patch14-384"),
    "siglip2": Pretrained(kind="vit", hub="google/siglip2-so400m-patch14-384"),
    "dinov2_large_336": Pretrained(kind="vit", hub="facebook/dinov2-large", input_px=336),
    "openai": Pretrained(kind="vit", hub="openai/clip-vit-large-patch14-336", n_layers=23),
    "metaclip_l14_336": Pretrained(
        kind="vit", hub="facebook/metaclip-l14-fullcc2.5b", input_px=336
    ),
    "metaclip_b16_224": Pretrained(kind="vit", hub="facebook/metaclip-b16-fullcc2.5b"),
    "metaclip_400m_b16_224": Pretrained(kind="vit", hub="facebook/metaclip-b16-400m"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model of transformers in a folder."""

    folder: Path
    name: str
    """As it was asked for."""
    config: Any
    weights: Weights


def find_folder(where: str) -> Path:
    """The folder itself, or the files of a hub's repository, fetched where they are not yet.

    Raises CheckpointError when there is neither.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        near = get_close_matches(where, PRETRAINED, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"{where!r} is neither a folder, nor a hub's 'owner/name', nor a known name "
            f"({', '.join(PRETRAINED)}){hint}"
        )
    try:
        folder = _fetch(where, "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = _fetch(where, PICKLED)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{where!r} cannot be fetched ({first_line(error)}); give its folder with "
            "--from, or set HF_TOKEN where the hub asks for leave"
        ) from error
    return folder


def _fetch(where: str, weights: str) -> Path:
    """Settings and weights of the top folder."""
    return Path(
        snapshot_download(where, allow_patterns=[*_SETTINGS, weights], ignore_patterns=["*/*"])
    )


def open_source(where: str) -> Source:
    """Raises CheckpointError when configuration or weights cannot be read."""
    folder = find_folder(where)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, *UNUSABLE) as error:
        raise CheckpointError(
            f"the configuration of {where!r} cannot be read ({first_line(error)}); "
            "expected a folder of transformers with config.json"
        ) from error
    return Source(folder=folder, name=where, config=config, weights=_weights(folder))


def _weights(folder: Path) -> Weights:
    path = folder / PICKLED
    if any(folder.glob("*.safetensors")) or not path.exists():
        return SafetensorsWeights(folder)
    try:
        tensors = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{PICKLED} of {folder.name!r} cannot be read ({first_line(error)})"
        ) from error
    return LoadedWeights(tensors)
