"""From media to what the engine's Molmo2 takes, as `molmo_hf`'s processors prepare them.

What differs from vLLM's own processor:

* token layouts come from the processed item itself, not from a second computation of the tiling
  with default settings, so they cannot disagree with the pixels;
* pixels stay bytes until the model normalises them (`modeling`);
* a video brings the target time of each frame; it is never sampled again here;
* pictures are turned to RGB as in training (alpha dropped, not painted white).

Knows: vLLM 0.32's multimodal processor interface, the processors' outputs. Does not know: files,
decoding (`video_loader`), the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import BatchFeature
from vllm.model_executor.models.molmo2 import (
    IMAGE_PROMPT,
    VIDEO_PROMPT,
    Molmo2MultiModalProcessor,
    Molmo2ProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from molmo_core.api_requests import MOST_CROPS
from molmo_core.images import (
    cut_image,
    grid_of,
    image_pooling,
    image_tokens,
    tiling_of,
)
from molmo_core.pixels import normalised
from molmo_core.tokens import SpecialIds
from molmo_core.videos import cut_frames, frame_pooling, frame_tokens, timestamp_text
from molmo_hf.image_processing_molmo2 import rgb_pixels
from molmo_hf.video_processing_molmo2 import FRAME_TIMES


class FaithfulDataParser(MultiModalDataParser):
    """Turns pictures to RGB before vLLM's own parser would put transparent ones on white."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, Image.Image):
            data = [data]
        if isinstance(data, list):
            data = [_rgb(item) if isinstance(item, Image.Image) else item for item in data]
        return super()._parse_image_data(data)


class FaithfulProcessingInfo(Molmo2ProcessingInfo):
    """Token ids of the checkpoint; pictures parsed as in training."""

    def get_data_parser(self) -> MultiModalDataParser:
        return FaithfulDataParser(
            video_needs_metadata=True, expected_hidden_size=self._get_expected_hidden_size()
        )

    @property
    def ids(self) -> SpecialIds:
        return SpecialIds(base_vocab_size=self.get_hf_config().text_config.vocab_size)


class FaithfulProcessor(Molmo2MultiModalProcessor):
    """Prepares the items of a request with the geometry of `molmo_hf`'s processors."""

    info: FaithfulProcessingInfo

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        max_crops = _asked_crops(hf_kwargs)
        hf_data, _, passthrough = self._get_hf_mm_inputs(mm_items, {})
        processed: dict[str, torch.Tensor] = {}
        if images := hf_data.get("images"):
            processed |= self._process_images(images, max_crops)
        if videos := hf_data.get("videos"):
            processed |= self._process_videos(videos)
        return self._finalize_hf_mm_data(hf_data, {}, passthrough, BatchFeature(processed))

    def _process_images(
        self, images: Sequence[Any], max_crops: int | None
    ) -> dict[str, torch.Tensor]:
        """One crop tensor for all images; sizes of each are counted beside it."""
        trained, ids = self.info.get_hf_processor().image_geometry(), self.info.ids
        geometry = replace(trained, max_crops=max_crops or trained.max_crops)
        pixels = [rgb_pixels(_rgb(image)) for image in images]
        crops = [cut_image(one, geometry) for one in pixels]
        sizes_hw = [one.shape[:2] for one in pixels]
        pooling = [image_pooling(*tiling_of(size_hw, geometry), geometry) for size_hw in sizes_hw]
        grids = [grid_of(size_hw, geometry) for size_hw in sizes_hw]
        token_ids = [[ids[token] for token in image_tokens(grid, geometry)] for grid in grids]
        n_crops = torch.tensor([len(one) for one in crops])
        return {
            "pixel_values": self._pixels(crops),
            "image_token_pooling": torch.from_numpy(np.concatenate(pooling)),
            "image_num_crops": n_crops,
            "image_num_pooled_patches": torch.tensor([len(one) for one in pooling]),
            "image_num_patches": n_crops * crops[0].shape[1],
            "image_tokens": torch.tensor([i for ids_ in token_ids for i in ids_]),
            "num_image_tokens": torch.tensor([len(ids_) for ids_ in token_ids]),
        }

    def _process_videos(self, videos: Sequence[Any]) -> dict[str, torch.Tensor]:
        """All frames of all videos; frames are taken as they come."""
        geometry, frame_ids = self.info.get_hf_processor().video_geometry(), self._frame_ids()
        crops = [cut_frames(np.asarray(frames), geometry) for frames, _ in videos]
        n_frames = torch.tensor([len(one) for one in crops])
        pooling = [frame_pooling(len(one), geometry) for one in crops]
        return {
            "pixel_values_videos": self._pixels(crops),
            "video_token_pooling": torch.from_numpy(np.concatenate(pooling)),
            "video_num_crops": n_frames,
            "video_num_pooled_patches": torch.tensor([len(one) for one in pooling]),
            "video_num_patches": n_frames * crops[0].shape[1],
            "video_tokens": torch.tensor(frame_ids * int(n_frames.sum())),
            "num_video_tokens": n_frames * len(frame_ids),
        }

    def _pixels(self, crops: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(crops, patches, patch² · 3) bytes; the model normalises them.

        What is kept in vLLM's caches and sent between its processes is a fourth of the floats.
        """
        return torch.from_numpy(np.concatenate(crops))

    def _frame_ids(self) -> list[int]:
        ids = self.info.ids
        return [ids[token] for token in frame_tokens(self.info.get_hf_processor().video_geometry())]

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        ids = self.info.ids

        def image_layout(index: int) -> PromptUpdateDetails[list[int]]:
            tokens = out_mm_kwargs["image"][index]["image_tokens"].data
            return PromptUpdateDetails.from_seq(tokens.tolist())

        def video_layout(index: int) -> PromptUpdateDetails[list[int]]:
            _, metadata = mm_items["video"][index]
            tokenizer, frame = self.info.get_tokenizer(), self._frame_ids()
            layout: list[int] = []
            for k, time_s in enumerate(frame_times_s(metadata)):
                stamp = timestamp_text(time_s, is_first=k == 0)
                layout += tokenizer.encode(stamp, add_special_tokens=False) + frame
            return PromptUpdateDetails.select_token_ids(layout, sorted(ids.visual))

        return [
            PromptReplacement("image", [ids[IMAGE_PROMPT]], image_layout),
            PromptReplacement("video", [ids[VIDEO_PROMPT]], video_layout),
        ]


class FloatProcessor(FaithfulProcessor):
    """For vLLM's own model, which takes normalised values."""

    def _pixels(self, crops: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        return torch.from_numpy(normalised(np.concatenate(crops)))


def _asked_crops(hf_kwargs: Mapping[str, object]) -> int | None:
    """The one setting that a request may bring (checked by the gateway, and here again)."""
    asked = dict(hf_kwargs)
    max_crops = asked.pop("max_crops", None)
    is_allowed = max_crops is None or (type(max_crops) is int and 1 <= max_crops <= MOST_CROPS)
    if asked or not is_allowed:
        raise ValueError(
            f"got the processor settings {dict(hf_kwargs)}; allowed is max_crops from 1 to "
            f"{MOST_CROPS}, all else is as the checkpoint was trained: leave it out"
        )
    return max_crops  # type: ignore[return-value]


def frame_times_s(metadata: Mapping[str, Any]) -> list[float]:
    """Target times of the frames; of clips without them (start-up dummies) index over rate."""
    if FRAME_TIMES in metadata:
        return list(metadata[FRAME_TIMES])
    return [index / metadata["fps"] for index in metadata["frames_indices"]]


def _rgb(image: Any) -> Any:
    picture = getattr(image, "media", image)  # vLLM wraps a picture together with its bytes
    return ImageOps.exif_transpose(picture).convert("RGB")
