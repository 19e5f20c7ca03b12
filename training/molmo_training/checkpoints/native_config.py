"""The `model` section of a native checkpoint's `config.yaml`, both ways.

Read: what of it decides the forward pass becomes our configuration and geometry; what the released
layout cannot say is refused, never guessed. Written: the section back again, from the original
when that was kept beside the Hugging Face files, else from what those say.

Knows: the reference's field names, defaults and legacy keys. Does not know: weights.
Source: spec of Molmo2's configuration and of its conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from molmo_core.errors import CheckpointError
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.configuration_molmo2 import (
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VitConfig,
)

CONFIG_FILE = "config.yaml"
MODEL_NAME = "video_olmo"
_POINT_NAMES = ("molmo_point", "token_indexing_video_molmo2")
_MASKS = {None: "none", "image_tokens": "all"}
_VIT_FIELDS = {
    "hidden_size": "image_emb_dim",
    "intermediate_size": "image_mlp_dim",
    "num_hidden_layers": "image_num_layers",
    "num_attention_heads": "image_num_heads",
    "num_key_value_heads": "image_num_key_value_heads",
    "head_dim": "image_head_dim",
    "hidden_act": "image_mlp_activations",
    "layer_norm_eps": "image_norm_eps",
    "image_default_input_size": "image_default_input_size",
    "image_patch_size": "image_patch_size",
    "image_num_pos": "image_num_pos",
    "float32_attention": "float32_attention",
}
_TEXT_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "additional_vocab_size": "additional_vocab_size",
    "qkv_bias": "qkv_bias",
    "rope_theta": "rope_theta",
    "use_qk_norm": "attention_layer_norm",
    "qk_norm_type": "attention_layer_norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "norm_after": "norm_after",
    "initializer_range": "initializer_range",
}
_WORDS = ("hidden_act", "qk_norm_type")
_ROPE_FIELDS = (
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "attention_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
# Field → the only values of which the released layout knows the meaning. Absent fields pass.
_LLM_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "block_type": ("sequential",),
    "layer_norm_type": ("rms",),
    "include_bias": (False,),
    "clip_qkv": (None,),
    "normalize_input_embeds": (False,),
    "scale_logits": (False,),
    "can_predict_extra_tokens": (False,),
    "rope": (True,),
}
_VISION_ONLY: dict[str, tuple[Any, ...]] = {
    "image_pooling_2d": ("attention_meanq",),
    "image_projector": ("mlp",),
    "image_padding_embed": (None,),
    "use_deepstack": (False,),
}
_VIT_ONLY: dict[str, tuple[Any, ...]] = {
    "image_model_type": ("siglip",),
    "resize_mode": ("siglip",),
    "normalize": ("siglip",),
}
_IMAGE_ONLY: dict[str, tuple[Any, ...]] = {"crop_mode": ("overlap-and-resize-c2",)}
_VIDEO_ONLY: dict[str, tuple[Any, ...]] = {
    "time_mode": ("per-frame-compact",),
    "frame_sample_mode": ("uniform_last_frame", "fps"),
}


@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    model: Molmo2Config
    images: ImageGeometry
    videos: VideoGeometry
    is_tied: bool
    """The language head is the embedding, and is not among the weights."""
    tokenizer: str
    """Name of the decoder's tokenizer, on a hub or as a folder."""
    notes: tuple[str, ...] = ()
    """What was trained and the released layout cannot say."""


def read_native_config(path: Path, *, max_model_len: int | None = None) -> NativeConfig:
    """Read `config.yaml`; `max_model_len` replaces the length the model was trained with.

    Raises CheckpointError for another model than Molmo2, or one that the released layout cannot
    say.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read ({error}); expected YAML with a section `model`"
        ) from error
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path.name} has no section `model`; expected a run of Molmo2")
    _check_kind(section)
    try:
        return _converted(section, max_model_len)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the section `model` of {path.name} lacks or spoils a field ({error!r})"
        ) from error


def write_native_config(path: Path, config: NativeConfig) -> None:
    """Write what of the `model` section decides the forward pass. Inverse of reading."""
    text, vit, adapter = (
        config.model.text_config,
        config.model.vit_config,
        config.model.adapter_config,
    )
    llm = {native: getattr(text, ours) for ours, native in _TEXT_FIELDS.items()}
    rope = {k: v for k, v in text.rope_parameters.items() if k != "rope_theta"}
    llm |= {f"rope_{k}" if k != "rope_type" else k: v for k, v in rope.items()}
    llm |= {
        "mlp_hidden_size": 2 * text.intermediate_size,
        "embedding_size": text.vocab_size,
        "vocab_size": text.vocab_size,
        "max_sequence_length": text.max_position_embeddings,
        "full_attention_layers": text.rope_scaling_layers,
        "weight_tying": config.is_tied,
        "tokenizer": {"identifier": config.tokenizer},
        **{name: only[0] for name, only in _LLM_ONLY.items()},
    }
    images, videos = config.images, config.videos
    masks = {ours: native for native, ours in _MASKS.items()}
    section = {
        "model_name": MODEL_NAME,
        "llm": llm,
        "vision_backbone": {
            "vit": {native: getattr(vit, ours) for ours, native in _VIT_FIELDS.items()}
            | {name: only[0] for name, only in _VIT_ONLY.items()},
            "vit_layers": list(adapter.vit_layers),
            "pooling_attention_mask": adapter.pooling_attention_mask,
            "image_feature_dropout": adapter.image_feature_dropout,
            "skip_unused_layers": True,
            **{name: only[0] for name, only in _VISION_ONLY.items()},
        },
        "mm_preprocessor": {
            "image": {
                "crop_mode": "overlap-and-resize-c2",
                "max_crops": images.max_crops,
                "max_multi_image_crops": images.max_crops,
                "pooling_h": images.pooling_hw[0],
                "pooling_w": images.pooling_hw[1],
                "overlap_margins": list(images.overlap_margins),
                "use_col_tokens": images.use_col_tokens,
                "use_single_crop_col_tokens": images.use_single_crop_col_tokens,
                "use_single_crop_start_token": images.use_single_crop_start_token,
            },
            "video": {
                "max_frames": videos.max_frames,
                "frame_sample_mode": videos.sample_mode,
                "max_fps": videos.max_fps,
                "time_mode": "per-frame-compact",
                "pooling_h": videos.pooling_hw[0],
                "pooling_w": videos.pooling_hw[1],
                "use_frame_special_tokens": videos.use_frame_special_tokens,
            },
        },
        "bi_directional_attn": masks[config.model.bidirectional],
    }
    path.write_text(yaml.safe_dump({"model": section}, sort_keys=False))


def _check_kind(section: Mapping[str, Any]) -> None:
    name = section.get("model_name", "molmo")
    if name in _POINT_NAMES:
        raise CheckpointError(
            "this is a MolmoPoint checkpoint, which points by choosing visual tokens; only Molmo2 "
            "(which writes coordinates) is read: take a Molmo2 checkpoint"
        )
    if name != MODEL_NAME or "llm" not in section:
        raise CheckpointError(
            f"model_name is {name!r}; only {MODEL_NAME!r} (Molmo2) is read, neither its "
            "predecessors nor configurations of the first version"
        )
    if section.get("vision_backbone") is None:
        raise CheckpointError("the checkpoint has no vision_backbone; it is a text model")
    mask = section.get("bi_directional_attn")
    if mask not in _MASKS:
        _refuse("bi_directional_attn", mask, tuple(_MASKS))


def _converted(section: Mapping[str, Any], max_model_len: int | None) -> NativeConfig:
    llm, vision, preprocessor = (
        section["llm"],
        section["vision_backbone"],
        section["mm_preprocessor"],
    )
    vit, image = vision["vit"], preprocessor["image"]
    # Before videos had a section of their own their fields stood beside `image`.
    video = preprocessor.get("video", preprocessor)
    for fields, only in (
        (llm, _LLM_ONLY),
        (vision, _VISION_ONLY),
        (vit, _VIT_ONLY),
        (image, _IMAGE_ONLY),
        (video, _VIDEO_ONLY),
    ):
        for name, allowed in only.items():
            if name in fields and fields[name] not in allowed:
                _refuse(name, fields[name], allowed)
    text = _text_config(llm, max_model_len)
    vit_fields = {ours: vit[native] for ours, native in _VIT_FIELDS.items()}
    _check_numbers(vit_fields)
    vit_config = Molmo2VitConfig(**vit_fields)
    adapter = Molmo2AdapterConfig(
        vit_layers=vision["vit_layers"],
        pooling_attention_mask=vision.get("pooling_attention_mask", False),
        hidden_size=vit_config.hidden_size,
        num_attention_heads=vit_config.num_attention_heads,
        num_key_value_heads=vit_config.num_key_value_heads,
        head_dim=vit_config.head_dim,
        float32_attention=vit_config.float32_attention,
        intermediate_size=text.intermediate_size,
        text_hidden_size=text.hidden_size,
        image_feature_dropout=vision.get("image_feature_dropout", 0.0),
    )
    images, notes = _image_geometry(image, vit_config)
    videos = _video_geometry(video, vit_config)
    if video.get("per_frame_special_token", True) is False and videos.use_frame_special_tokens:
        notes += (
            "trained with frame tokens around the whole video; released models have them around "
            "each frame, and so it is served",
        )
    model = Molmo2Config(
        vit_config=vit_config,
        adapter_config=adapter,
        text_config=text,
        use_frame_special_tokens=videos.use_frame_special_tokens,
        initializer_range=text.initializer_range,
        bidirectional=_MASKS[section.get("bi_directional_attn")],
    )
    tokenizer = llm["tokenizer"]
    return NativeConfig(
        model=model,
        images=images,
        videos=videos,
        is_tied=bool(llm.get("weight_tying", False)),
        tokenizer=tokenizer.get("tokenizer_dir") or tokenizer["identifier"],
        notes=notes,
    )


def _text_config(llm: Mapping[str, Any], max_model_len: int | None) -> Molmo2TextConfig:
    fields = {ours: llm[native] for ours, native in _TEXT_FIELDS.items() if native in llm}
    _check_numbers(fields)
    if fields.get("head_dim") is None:
        fields["head_dim"] = llm["d_model"] // llm["n_heads"]
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = 1 if llm.get("multi_query_attention") else llm["n_heads"]
    wide = llm.get("mlp_hidden_size") or llm["mlp_ratio"] * llm["d_model"]
    scaling = None
    if (rope_type := llm.get("rope_type", "default")) != "default":
        values = {name: llm.get(f"rope_{name}") for name in _ROPE_FIELDS}
        scaling = {"rope_type": rope_type} | {k: v for k, v in values.items() if v is not None}
    layers = llm.get("full_attention_layers")
    if layers is not None and llm.get("sliding_attention_rope_scaling", False):
        layers = [k for k in range(llm["n_layers"]) if k not in layers]
    trained_len = llm.get("max_position_embeddings") or llm["max_sequence_length"]
    return Molmo2TextConfig(
        **fields,
        vocab_size=llm.get("embedding_size") or llm["vocab_size"],
        intermediate_size=wide // 2,  # the reference counts up and gate together
        hidden_act="silu",
        max_position_embeddings=max_model_len or trained_len,
        rope_scaling=scaling,
        rope_scaling_layers=None if layers is None else list(layers),
    )


def _check_numbers(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for words where only names may be words."""
    words = {k: v for k, v in fields.items() if isinstance(v, str) and k not in _WORDS}
    if words:
        raise ValueError(f"expected numbers, got {words}")


def _image_geometry(
    image: Mapping[str, Any], vit: Molmo2VitConfig
) -> tuple[ImageGeometry, tuple[str, ...]]:
    """The reference's defaults stand where a field is absent."""
    geometry = ImageGeometry(
        crop_px=vit.image_default_input_size[0],
        patch_px=vit.image_patch_size,
        pooling_hw=(image.get("pooling_h", 2), image.get("pooling_w", 2)),
        max_crops=image.get("max_crops", 6),
        overlap_margins=tuple(image.get("overlap_margins", (4, 4))),
        use_col_tokens=image.get("use_col_tokens", True),
        use_single_crop_col_tokens=image.get("use_single_crop_col_tokens"),
        use_single_crop_start_token=image.get("use_single_crop_start_token", False),
    )
    several = image.get("max_multi_image_crops", 4)
    pooling = (image.get("multi_image_pooling_h", 2), image.get("multi_image_pooling_w", 2))
    if image.get("max_images") is None:  # it was never shown several
        return geometry, ()
    if pooling != geometry.pooling_hw:
        _refuse("multi_image_pooling", pooling, (geometry.pooling_hw,))
    if several != geometry.max_crops:
        return geometry, (
            f"trained with at most {several} crops where there are several images; the released "
            f"layout has one figure, {geometry.max_crops}, and so it is served",
        )
    return geometry, ()


def _video_geometry(video: Mapping[str, Any], vit: Molmo2VitConfig) -> VideoGeometry:
    max_fps = video.get("max_fps")
    if isinstance(max_fps, list | tuple):
        if len(max_fps) != 1:
            _refuse("max_fps", max_fps, ("one figure",))
        max_fps = max_fps[0]
    return VideoGeometry(
        crop_px=vit.image_default_input_size[0],
        patch_px=vit.image_patch_size,
        pooling_hw=(video.get("pooling_h", 3), video.get("pooling_w", 3)),
        sample_mode=video.get("frame_sample_mode", "fps"),
        max_frames=video["max_frames"],
        max_fps=max_fps,
        use_frame_special_tokens=video.get("use_frame_special_tokens", True),
    )


def _refuse(name: str, value: Any, allowed: tuple[Any, ...]) -> NoReturn:
    raise CheckpointError(
        f"{name} is {value!r}; the released layout of Molmo2 only knows {list(allowed)}: this "
        "checkpoint cannot be said in it"
    )
