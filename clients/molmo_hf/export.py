"""Writing a Molmo2 checkpoint as a folder that every reader understands, and reading one.

Readers: ours, stock transformers 5 and 4.57 (with the bundled code files), stock vLLM. So the
folder holds both the separate processor files of 4.57, by which vLLM also chooses its video
loader, and the joint one.

Knows: files and fields of a released folder. Does not know: training state, publishing
(manifest, rename), how the numbers came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.bundled_code import AUTO_MAPS, write_bundled_code
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_hf.tokenizer import check_tokenizer, save_tokenizer
from molmo_hf.weight_files import LoadedWeights, Place, Weights, write_weights

ARCHITECTURE = "Molmo2ForConditionalGeneration"
EMBEDDING = "model.transformer.wte.embedding"
HEAD = "lm_head.weight"


def save_checkpoint(
    weights: nn.Module | Mapping[str, Tensor] | Weights,
    folder: Path,
    *,
    config: Molmo2Config,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageGeometry | None = None,
    videos: VideoGeometry | None = None,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    with_code: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the folder and return it.

    The weights are read one at a time, cast to `dtype` and cut into files of at most
    `shard_bytes`. A tied language head is written out, as released. The other arguments and the
    errors are those of `save_settings`.
    """
    save_settings(
        folder,
        config=config,
        tokenizer=tokenizer,
        images=images,
        videos=videos,
        compute_dtype=compute_dtype or dtype,
        with_code=with_code,
    )
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, Mapping):
        weights = LoadedWeights(weights)
    write_weights(WithHead(weights), folder, dtype=dtype, shard_bytes=shard_bytes)
    return folder


def save_settings(
    folder: Path,
    *,
    config: Molmo2Config,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageGeometry | None = None,
    videos: VideoGeometry | None = None,
    compute_dtype: torch.dtype = torch.float32,
    with_code: bool = False,
) -> None:
    """Write everything of the folder but the weights.

    `images` and `videos` are the settings the model was trained with; `compute_dtype` is what the
    config tells readers to compute in. `with_code` bundles the code for `trust_remote_code`
    readers.
    Raises CheckpointError when the folder is not empty, or the tokenizer or the settings do not
    fit the config.
    """
    images, videos = images or ImageGeometry(), videos or VideoGeometry()
    check_tokenizer(tokenizer, config.text_config.vocab_size)
    _check_geometry(config, images, videos)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(
            f"the folder {folder.name!r} is not empty; a checkpoint is never overwritten: "
            "choose a new name"
        )
    save_tokenizer(tokenizer, folder)
    template = files("molmo_hf").joinpath("chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    for name, fields in _settings_files(config, tokenizer, images, videos, compute_dtype).items():
        if with_code and name in AUTO_MAPS:
            fields = {**fields, "auto_map": AUTO_MAPS[name]}
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n")
    if with_code:
        write_bundled_code(folder)


@dataclass(frozen=True)
class WithHead:
    """The language head stands for itself even when it is tied, as released."""

    weights: Weights

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = dict(self.weights.shapes())
        return shapes if HEAD in shapes else {**shapes, HEAD: shapes[EMBEDDING]}

    def read(self, name: str) -> Tensor:
        return self.weights.read(self._behind(name))

    def place(self, name: str) -> Place | None:
        return self.weights.place(self._behind(name))

    def _behind(self, name: str) -> str:
        is_tied = name == HEAD and HEAD not in self.weights.shapes()
        return EMBEDDING if is_tied else name


def load_processor(folder: Path | str) -> Molmo2Processor:
    """Read tokenizer, processors and chat template of a folder. Raises CheckpointError."""
    import molmo_hf

    molmo_hf.register()
    try:
        processor: Molmo2Processor = Molmo2Processor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the processor of {Path(folder).name!r} cannot be read ({error}); expected a "
            "Hugging Face folder with processor and tokenizer files"
        ) from error
    if processor.chat_template is None:
        template = files("molmo_hf").joinpath("chat_template.jinja").read_text()
        processor.chat_template = processor.tokenizer.chat_template = template
    return processor


def _settings_files(
    config: Molmo2Config,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageGeometry,
    videos: VideoGeometry,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """Name → fields of each JSON file."""
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return {
        "config.json": _config_fields(config, dtype),
        "generation_config.json": {
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "preprocessor_config.json": _image_fields(images),
        "video_preprocessor_config.json": _video_fields(videos),
        "processor_config.json": _joint_fields(images, videos),
    }


def _config_fields(config: Molmo2Config, dtype: torch.dtype) -> dict[str, Any]:
    """Molmo2's own fields; what every configuration of transformers has by default is left out."""
    defaults = PretrainedConfig().to_dict()

    def own(fields: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}

    fields = own(config.to_dict())
    for part in config.sub_configs:
        fields[part] = own(fields[part])
    fields["text_config"]["tie_word_embeddings"] = False  # the head is written out
    fields.pop("auto_map", None)
    return fields | {
        "architectures": [ARCHITECTURE],
        "model_type": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
    }


def _pixel_fields(crop_px: int, patch_px: int, pooling_hw: tuple[int, int]) -> dict[str, Any]:
    return {
        "processor_class": "Molmo2Processor",
        "size": {"height": crop_px, "width": crop_px},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "patch_size": patch_px,
        "pooling_size": list(pooling_hw),
    }


def _image_fields(images: ImageGeometry) -> dict[str, Any]:
    return {
        "image_processor_type": "Molmo2ImageProcessor",
        **_pixel_fields(images.crop_px, images.patch_px, images.pooling_hw),
        "max_crops": images.max_crops,
        "overlap_margins": list(images.overlap_margins),
    }


def _video_fields(videos: VideoGeometry) -> dict[str, Any]:
    return {
        "video_processor_type": "Molmo2VideoProcessor",
        **_pixel_fields(videos.crop_px, videos.patch_px, videos.pooling_hw),
        "do_sample_frames": True,
        "frame_sample_mode": videos.sample_mode,
        "num_frames": videos.max_frames,
        "max_fps": videos.max_fps,
        "sampling_fps": videos.sampling_fps,
    }


def _joint_fields(images: ImageGeometry, videos: VideoGeometry) -> dict[str, Any]:
    return {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": images.use_col_tokens,
        "use_single_crop_col_tokens": images.use_single_crop_col_tokens,
        "use_single_crop_start_token": images.use_single_crop_start_token,
        "video_use_col_tokens": videos.use_col_tokens,
        "use_frame_special_tokens": videos.use_frame_special_tokens,
        "use_low_res_token_for_global_crops": False,
    }


def _check_geometry(config: Molmo2Config, images: ImageGeometry, videos: VideoGeometry) -> None:
    """The vision tower must see what the processors cut."""
    vit = config.vit_config
    wanted = (vit.image_default_input_size[0], vit.image_patch_size)
    for name, geometry in (("images", images), ("videos", videos)):
        if (geometry.crop_px, geometry.patch_px) != wanted:
            raise CheckpointError(
                f"{name}: crops of {geometry.crop_px} px with patches of {geometry.patch_px} px; "
                f"the vision tower takes {wanted[0]} and {wanted[1]}: pass the settings of training"
            )
