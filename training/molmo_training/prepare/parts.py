"""The parts of a Molmo2 that come pretrained, a decoder or a vision tower: opened and written.

A prepared part is a folder with `part.json`, safetensors files under Molmo2's names and, of a
decoder, the tokenizer with Molmo2's special tokens.

Knows: the form of that folder, which code reads which kind of model. Does not know: how tensors
are converted (`llms`, `vits`), how parts meet (`initial`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from molmo_core.errors import CheckpointError
from molmo_hf.configuration_molmo2 import Molmo2TextConfig, Molmo2VitConfig
from molmo_hf.tokenizer import build_tokenizer, check_tokenizer, save_tokenizer
from molmo_hf.weight_files import Weights, write_weights
from molmo_training.checkpoints.convert import SHARD_BYTES, appearing
from molmo_training.checkpoints.safetensors_weights import SafetensorsWeights
from molmo_training.checkpoints.wording import first_line
from molmo_training.prepare.derived import check_shapes
from molmo_training.prepare.llms import LLM_TYPES, llm_shapes, llm_weights, text_config_of
from molmo_training.prepare.sources import (
    PRETRAINED,
    UNUSABLE,
    Pretrained,
    Source,
    open_source,
)
from molmo_training.prepare.vits import (
    FAMILIES,
    Pixels,
    vision_config_of,
    vit_config_of,
    vit_shapes,
    vit_weights,
)

PART_FILE = "part.json"
_PIXELS_FILE, _TOKENIZER_FILE = "preprocessor_config.json", "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class LlmPart:
    """Everything of the decoder but the new rows; a tied head is left out."""

    name: str
    config: Molmo2TextConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerFast
    """With Molmo2's special tokens behind the base vocabulary."""


@dataclass(frozen=True, kw_only=True)
class VitPart:
    """All layers of a tower."""

    name: str
    config: Molmo2VitConfig
    weights: Weights


Part = LlmPart | VitPart


def open_part(name: str, *, source: str | None = None, input_px: int | None = None) -> Part:
    """A known name, a prepared part, a folder of transformers, or a hub's 'owner/name'.

    `source` is read instead of the hub's folder of a known name; `input_px` is the side of the
    crops that a tower is to see. Raises CheckpointError.
    """
    folder = Path(source or name).expanduser()
    if (folder / PART_FILE).exists():
        return _open_prepared(folder, input_px)
    known = PRETRAINED.get(name)
    opened = open_source(source or (known.hub if known else name))
    try:
        return _open(name, known, opened, input_px)
    except UNUSABLE as error:
        raise CheckpointError(
            f"the configuration of {opened.name!r} makes no model ({error!r}); copy it again"
        ) from error


def _open(name: str, known: Pretrained | None, opened: Source, input_px: int | None) -> Part:
    model_type = opened.config.model_type
    if model_type in LLM_TYPES and (known is None or known.kind == "llm"):
        if input_px is not None:
            raise CheckpointError(f"{name!r} is a language model; crops belong to a vision tower")
        return _open_llm(name, opened)
    if (vision := vision_config_of(opened.config)) and (known is None or known.kind == "vit"):
        if known is not None and input_px is None:
            input_px = known.input_px
        n_layers = known.n_layers if known else None
        return _open_vit(name, opened, vision, input_px=input_px, n_layers=n_layers)
    wanted = f"for {name!r} a {known.kind} is wanted; " if known else ""
    raise CheckpointError(
        f"{opened.name!r} is of model_type {model_type!r}; {wanted}read are the language models "
        f"{list(LLM_TYPES)} and the towers {list(FAMILIES)}"
    )


def write_part(part: Part, out: Path, *, dtype: torch.dtype) -> Path:
    """Write a part as a folder, tensor by tensor; it appears when it is complete.

    Raises CheckpointError when `out` exists.
    """
    with appearing(out) as partial:
        partial.mkdir()
        kind = "llm" if isinstance(part, LlmPart) else "vit"
        fields = {"part": kind, "name": part.name, "config": part.config.to_dict()}
        (partial / PART_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        if isinstance(part, LlmPart):
            save_tokenizer(part.tokenizer, partial)
        write_weights(part.weights, partial, dtype=dtype, shard_bytes=SHARD_BYTES)
    return out


def _open_prepared(folder: Path, input_px: int | None) -> Part:
    try:
        fields = json.loads((folder / PART_FILE).read_text())
        kind, name, settings = fields["part"], fields["name"], fields["config"]
        is_llm = {"llm": True, "vit": False}[kind]
        text = Molmo2TextConfig(**settings) if is_llm else None
        vit = None if is_llm else Molmo2VitConfig(**settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{PART_FILE} of {folder.name!r} cannot be read ({error!r}); prepare the part again"
        ) from error
    weights = SafetensorsWeights(folder)
    if text is not None:
        check_shapes(weights, llm_shapes(text))
        tokenizer = _read_tokenizer(folder)
        check_tokenizer(tokenizer, text.vocab_size)
        return LlmPart(name=name, config=text, weights=weights, tokenizer=tokenizer)
    assert vit is not None
    if input_px not in (None, vit.image_default_input_size[0]):
        raise CheckpointError(
            f"{folder.name!r} was prepared for crops of {vit.image_default_input_size[0]} px, "
            f"asked for are {input_px}: prepare it again from its source"
        )
    check_shapes(weights, vit_shapes(vit))
    return VitPart(name=name, config=vit, weights=weights)


def _open_llm(name: str, source: Source) -> LlmPart:
    config = text_config_of(source.config)
    return LlmPart(
        name=name,
        config=config,
        weights=llm_weights(source.weights, source.config.model_type, config),
        tokenizer=build_tokenizer(_read_tokenizer(source.folder), config.vocab_size),
    )


def _open_vit(
    name: str, source: Source, vision: Any, *, input_px: int | None, n_layers: int | None
) -> VitPart:
    config = vit_config_of(vision, input_px=input_px, n_layers=n_layers)
    pixels = _pixels(source.folder)
    weights = vit_weights(source.weights, vision, config, pixels)
    return VitPart(name=name, config=config, weights=weights)


def _pixels(folder: Path) -> Pixels | None:
    """Mean and deviation that the folder's processor normalises with, where it says so."""
    path = folder / _PIXELS_FILE
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        if "image_mean" not in fields:
            return None
        mean, std = (tuple(map(float, fields[name])) for name in ("image_mean", "image_std"))
        if (len(mean), len(std)) != (3, 3) or min(std) <= 0:
            raise ValueError(f"mean {mean}, deviation {std}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{_PIXELS_FILE} of {folder.name!r} cannot be read ({error!r}); expected image_mean "
            "and image_std, three numbers each"
        ) from error
    return mean, std


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """As `tokenizer.json` has it; some classes of transformers would put in their own rules."""
    try:
        if not (folder / _TOKENIZER_FILE).exists():
            raise OSError("the file is missing")
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{_TOKENIZER_FILE} of {folder.name!r} cannot be read ({first_line(error)}); "
            "a language model's folder holds its tokenizer beside the weights"
        ) from error
    return tokenizer
