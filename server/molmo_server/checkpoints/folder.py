"""What the gateway knows of a checkpoint folder: its id, its geometry, its tokenizer.

The id of a published checkpoint is its manifest's; else `<folder name>@<8 hex digits>`: the digits
change with the configuration, the tensor names and shapes, and with the weights: of each weight
file, blocks spread evenly are hashed, so that 16 GB are told apart in milliseconds. It tells
checkpoints apart, it is no seal.

Knows: the released layout and transformers 5's single processor file. Does not know: weights,
engines, requests.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from molmo_core.checkpoints import MANIFEST, read_manifest
from molmo_core.checkpoints.safetensors_header import read_header
from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.tokens import (
    FRAME_END,
    FRAME_START,
    IM_COL,
    IM_END,
    IM_PATCH,
    IM_START,
    LOW_RES_IM_START,
    find_control_token,
)
from molmo_core.videos import VideoGeometry

_UNFIT_FOR_HEADERS = re.compile(r"[^A-Za-z0-9._-]")
_EXPECTED = "expected a Hugging Face folder with config, processor, tokenizer and safetensors"
_TOKEN_FIELDS = {
    "image_start_token_id": IM_START,
    "image_end_token_id": IM_END,
    "image_patch_id": IM_PATCH,
    "image_col_id": IM_COL,
    "low_res_image_start_token_id": LOW_RES_IM_START,
    "frame_start_token_id": FRAME_START,
    "frame_end_token_id": FRAME_END,
}
"""Of config.json, and how the tokenizer spells each."""
_N_BLOCKS = 64
_BLOCK_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    folder: Path
    id: str
    max_model_len: int
    image: ImageGeometry
    video: VideoGeometry
    tokenizer: Tokenizer

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`; special tokens spelt out count as one each, BOS is not included."""
        # The fast form leaves out offsets, which take a third of the time.
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoded)

    @cached_property
    def longest_token_chars(self) -> int:
        """No token stands for more characters: bounds the tokens of a text from below."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    @cached_property
    def bos_id(self) -> int | None:
        """What stands in front of every prompt; None where the folder does not say."""
        fields = _read_json(self.folder / "tokenizer_config.json", is_optional=True)
        token = fields.get("bos_token") or fields.get("eos_token")
        spelling = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(spelling) if isinstance(spelling, str) else None

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no caller may send: what the model sees media and turns by."""
        added = self.tokenizer.get_added_tokens_decoder().items()
        return frozenset(k for k, token in added if find_control_token(token.content))


def read_checkpoint(folder: Path, *, max_model_len: int | None = None) -> Checkpoint:
    """Read a folder; `max_model_len` may only shorten what the configuration allows.

    Raises CheckpointError when a file is missing or cannot be read.
    """
    config = _read_json(folder / "config.json")
    joint = _read_json(folder / "processor_config.json", is_optional=True)
    image = _read_json(folder / "preprocessor_config.json", is_optional=True)
    video = _read_json(folder / "video_preprocessor_config.json", is_optional=True)
    _check_weight_files(folder)
    tokenizer = _tokenizer(folder)
    try:
        _check_tokens(folder.name, config, tokenizer)
        trained_len = int(config["text_config"]["max_position_embeddings"])
        return Checkpoint(
            folder=folder,
            id=_id_of(folder),
            max_model_len=min(max_model_len or trained_len, trained_len),
            image=_image_geometry(image or joint.get("image_processor", {}), joint),
            video=_video_geometry(video or joint.get("video_processor", {}), joint),
            tokenizer=tokenizer,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {folder.name!r} cannot be used ({error!r}); {_EXPECTED}"
        ) from error


def weight_differences(old: Path, new: Path) -> list[str]:
    """Why the tensors of `new` cannot take the place of those of `old`; empty if they can.

    Names, types and shapes must be the same. Raises CheckpointError for a header that is damaged.
    """
    wrong = []
    shapes_old, shapes_new = _shapes(old), _shapes(new)
    if lacking := sorted(shapes_old.keys() - shapes_new.keys()):
        wrong.append(f"{len(lacking)} tensors are missing, as {lacking[0]}")
    if foreign := sorted(shapes_new.keys() - shapes_old.keys()):
        wrong.append(f"{len(foreign)} tensors are foreign, as {foreign[0]}")
    for name in sorted(shapes_old.keys() & shapes_new.keys()):
        if shapes_old[name] != shapes_new[name]:
            wrong.append(f"{name} is {shapes_new[name]}, running is {shapes_old[name]}")
            break
    return wrong


def _shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor, from the headers of the files. Raises CheckpointError."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header, _ = read_header(path)
            shapes |= {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path.name} cannot be read ({error})") from error
    return shapes


def _id_of(folder: Path) -> str:
    """A published checkpoint has its own; it is told by its content as well."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder).id
    return f"{_UNFIT_FOR_HEADERS.sub('-', folder.resolve().name)}@{_fingerprint(folder)}"


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"tokenizer.json of checkpoint {folder.name!r} cannot be read ({error}); {_EXPECTED}"
        ) from error


def _check_weight_files(folder: Path) -> None:
    """Raises CheckpointError unless the engine loads just the files that are looked at here."""
    found = {path.name for path in folder.glob("*.safetensors")}
    index = _read_json(folder / "model.safetensors.index.json", is_optional=True)
    try:
        named = set(index["weight_map"].values()) if index else found
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"model.safetensors.index.json of checkpoint {folder.name!r} has no weight_map"
        ) from error
    if not found or named != found or any(name.startswith("consolidated") for name in found):
        raise CheckpointError(
            f"checkpoint {folder.name!r} holds the weight files {sorted(found)[:4] or 'none'}, its "
            f"index names {sorted(named)[:4] or 'none'}; {_EXPECTED}"
        )


def _check_tokens(name: str, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises CheckpointError when the model would see other tokens than its texts are made of."""
    for field, token in _TOKEN_FIELDS.items():
        expected, found = config.get(field), tokenizer.token_to_id(token)
        if expected is not None and expected != found:
            raise CheckpointError(
                f"the tokenizer of checkpoint {name!r} is not that of its model: it has {token} as "
                f"{found}, {field} of config.json is {expected}"
            )


def _image_geometry(fields: dict[str, Any], joint: dict[str, Any]) -> ImageGeometry:
    default = ImageGeometry()
    return ImageGeometry(
        crop_px=fields.get("size", {}).get("height", default.crop_px),
        patch_px=fields.get("patch_size", default.patch_px),
        pooling_hw=_pair(fields.get("pooling_size", default.pooling_hw)),
        max_crops=fields.get("max_crops", default.max_crops),
        overlap_margins=_pair(fields.get("overlap_margins", default.overlap_margins)),
        use_col_tokens=joint.get("image_use_col_tokens", default.use_col_tokens),
        use_single_crop_col_tokens=joint.get(
            "use_single_crop_col_tokens", default.use_single_crop_col_tokens
        ),
        use_single_crop_start_token=joint.get(
            "use_single_crop_start_token", default.use_single_crop_start_token
        ),
    )


def _video_geometry(fields: dict[str, Any], joint: dict[str, Any]) -> VideoGeometry:
    default = VideoGeometry()
    return VideoGeometry(
        crop_px=fields.get("size", {}).get("height", default.crop_px),
        patch_px=fields.get("patch_size", default.patch_px),
        pooling_hw=_pair(fields.get("pooling_size", default.pooling_hw)),
        sample_mode=fields.get("frame_sample_mode", default.sample_mode),
        max_frames=fields.get("num_frames", default.max_frames),
        max_fps=fields.get("max_fps", default.max_fps),
        sampling_fps=fields.get("sampling_fps", default.sampling_fps),
        use_col_tokens=joint.get("video_use_col_tokens", default.use_col_tokens),
        use_frame_special_tokens=joint.get(
            "use_frame_special_tokens", default.use_frame_special_tokens
        ),
    )


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(n_header, size)))
            start, step = 8 + n_header, max((size - n_header - 8) // _N_BLOCKS, _BLOCK_BYTES)
            for offset in range(start, size, step):
                file.seek(offset)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:8]


def _read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    if is_optional and not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} of checkpoint {path.parent.name!r} cannot be read ({error}); {_EXPECTED}"
        ) from error
    return content
