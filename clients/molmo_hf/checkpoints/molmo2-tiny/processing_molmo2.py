"""Molmo2's processor: text with placeholders and media in, everything the model takes out.

Knows: which tokens stand for a picture or a clip, BOS, padding. Does not know: the arithmetic
(`molmo_core`), the chat layout (`chat_template.jinja`). Native to transformers 5, importable
under 4.57; an export carries it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import transformers
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .molmo2_errors import InvalidRequest, TooManyMedia
from .molmo2_images import ImageGeometry, ImageGrid, image_tokens
from .molmo2_tokens import IMAGE, VIDEO, VISUAL_TOKENS
from .molmo2_videos import VideoGeometry, video_text

from .video_processing_molmo2 import FRAME_TIMES

_PLACEHOLDER = re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")
_IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")
_GROUPS = {
    "text_kwargs": ("padding", "max_length", "return_mm_token_type_ids", "add_special_tokens"),
    "images_kwargs": ("max_crops",),
    "videos_kwargs": ("video_metadata", "do_sample_frames", "return_metadata"),
    "common_kwargs": ("return_tensors",),
}
"""Call settings by the group in which transformers lets them be passed."""


class Molmo2Processor(ProcessorMixin):
    """Joins image processor, video processor and tokenizer."""

    attributes = ["image_processor", "video_processor", "tokenizer"]  # noqa: RUF012 - for 4.57
    if _IS_TRANSFORMERS_4:  # transformers 5 reads the signature, and calls these deprecated
        image_processor_class = "AutoImageProcessor"
        video_processor_class = "AutoVideoProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_use_col_tokens: bool = True,
        use_single_crop_col_tokens: bool | None = False,
        use_single_crop_start_token: bool = True,
        video_use_col_tokens: bool = False,
        use_frame_special_tokens: bool = True,
        use_low_res_token_for_global_crops: bool = False,
    ) -> None:
        if use_low_res_token_for_global_crops:
            raise ValueError("use_low_res_token_for_global_crops is MolmoPoint's: set it to False")
        # ProcessorMixin of a process that imported vLLM resets it: set again below.
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)
        self.chat_template = chat_template
        self.image_use_col_tokens = image_use_col_tokens
        self.use_single_crop_col_tokens = use_single_crop_col_tokens
        self.use_single_crop_start_token = use_single_crop_start_token
        self.video_use_col_tokens = video_use_col_tokens
        self.use_frame_special_tokens = use_frame_special_tokens
        self.use_low_res_token_for_global_crops = use_low_res_token_for_global_crops
        self.image_token, self.video_token = IMAGE, VIDEO

    def image_geometry(self) -> ImageGeometry:
        """How pictures are cut and written as tokens."""
        return replace(
            self.image_processor.geometry(),
            use_col_tokens=self.image_use_col_tokens,
            use_single_crop_col_tokens=self.use_single_crop_col_tokens,
            use_single_crop_start_token=self.use_single_crop_start_token,
        )

    def video_geometry(self) -> VideoGeometry:
        """How clips are sampled, cut and written as tokens."""
        return replace(
            self.video_processor.geometry(),
            use_col_tokens=self.video_use_col_tokens,
            use_frame_special_tokens=self.use_frame_special_tokens,
        )

    @property
    def bos_token_id(self) -> int:
        """The tokenizer's BOS; EOS where it has none."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Turn texts with `<|image|>` and `<|video|>` into what the model takes.

        Media are assigned to placeholders in order, over all texts. Settings: `return_tensors`;
        `padding` (default: when tensors are asked for), `max_length`, `return_mm_token_type_ids`
        (default True); `max_crops`; `video_metadata`, `do_sample_frames`, `return_metadata`.

        Returns `input_ids`, `attention_mask`, `token_type_ids` (1 on visual tokens), each
        (texts, tokens) and padded on the left, and the outputs of the media processors.
        Raises InvalidRequest, TooManyMedia or InvalidMedia.
        """
        chosen = _settings(settings)
        texts = _texts(text, audio)
        tensors = chosen.get("return_tensors")
        media, blocks = self._media(images, videos, chosen)
        rows = [self._encode(t) for t in _filled(texts, blocks)]
        padding = chosen.get("padding", tensors is not None)
        inputs = self._inputs(rows, padding, chosen.get("max_length"))
        if not chosen.get("return_mm_token_type_ids", True):
            del inputs["token_type_ids"]
        told = media.pop("video_metadata", None)
        features = BatchFeature({**inputs, **media}, tensor_type=tensors)
        if chosen.get("return_metadata"):
            features["video_metadata"] = told
        return features

    def _media(
        self, images: Any, videos: Any, chosen: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Arrays of the media, and for each placeholder the texts that replace it, in order."""
        if images is not None and videos is not None:
            raise InvalidRequest(
                "got images and a video in one call; Molmo2 knows one kind at a time: send the "
                "images or the video"
            )
        blocks: dict[str, list[str]] = {IMAGE: [], VIDEO: []}
        if images is not None:
            geometry = self.image_geometry()
            media = self.image_processor(images, max_crops=chosen.get("max_crops"))
            blocks[IMAGE] = [
                "".join(image_tokens(ImageGrid(*map(int, grid)), geometry))
                for grid in media["image_grids"]
            ]
            return dict(media), blocks
        if videos is None:
            return {}, blocks
        media = self.video_processor(
            videos,
            video_metadata=chosen.get("video_metadata"),
            do_sample_frames=chosen.get("do_sample_frames"),
            return_metadata=True,
        )
        blocks[VIDEO] = [
            _clip_text(clip[FRAME_TIMES], self.video_geometry()) for clip in media["video_metadata"]
        ]
        return dict(media), blocks

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def _inputs(
        self, rows: list[list[int]], padding: Any, max_length: int | None
    ) -> dict[str, list[list[int]]]:
        visual = set(self.tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))
        longest = max(map(len, rows))
        width = max_length if padding == "max_length" and max_length else longest
        if longest > (max_length or longest):
            raise InvalidRequest(
                f"the text has {longest} tokens, max_length is {max_length}; shorten it or send "
                "fewer media: cutting would separate pixels from their tokens"
            )
        if not padding or padding == "do_not_pad":
            missing = [0] * len(rows)
        else:
            missing = [width - len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": [[pad] * n + row for n, row in zip(missing, rows, strict=True)],
            "attention_mask": [
                [0] * n + [1] * len(row) for n, row in zip(missing, rows, strict=True)
            ],
            "token_type_ids": [
                [0] * n + [int(i in visual) for i in row]
                for n, row in zip(missing, rows, strict=True)
            ],
        }

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "token_type_ids",
            *self.image_processor.model_input_names,
            *self.video_processor.model_input_names,
        ]


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten transformers' groups; raise TypeError for what is unknown."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        flat |= value if name in _GROUPS else {name: value}
    known = {name for names in _GROUPS.values() for name in names}
    if unknown := sorted(set(flat) - known):
        raise TypeError(f"unknown settings {unknown} of the processor; known are {sorted(known)}")
    return flat


def _texts(text: str | list[str] | None, audio: object) -> list[str]:
    if audio is not None:
        raise InvalidRequest("got audio; Molmo2 takes text, images and video: leave it out")
    texts = [text] if isinstance(text, str) else list(text or [])
    if not texts:
        raise InvalidRequest(f"got no text; give one that holds {IMAGE} or {VIDEO} for each medium")
    return texts


def _filled(texts: list[str], blocks: Mapping[str, list[str]]) -> Iterator[str]:
    """Each text with its placeholders replaced. Raises when numbers differ."""
    placeholders = [m for text in texts for m in _PLACEHOLDER.findall(text)]
    for text in texts:
        if (n_videos := text.count(VIDEO)) > 1:
            raise TooManyMedia(f"got {n_videos} videos in one text; send one video a text")
    for token, noun in ((IMAGE, "images"), (VIDEO, "videos")):
        n_places, n_media = placeholders.count(token), len(blocks[token])
        if n_places != n_media:
            raise InvalidRequest(
                f"got {n_media} {noun} for {n_places} placeholders {token} in the text; "
                "give one for each"
            )
    waiting = {token: iter(of_token) for token, of_token in blocks.items()}
    for text in texts:
        yield _PLACEHOLDER.sub(lambda match: next(waiting[match.group()]), text)


def _clip_text(times_s: list[float] | None, geometry: VideoGeometry) -> str:
    if times_s is None:
        raise InvalidRequest(
            "got video frames without their times; pass metadata with 'frame_times_s', or 'fps' "
            "and 'frames_indices'"
        )
    return video_text(times_s, geometry)

import typing

if typing.TYPE_CHECKING:  # never run: tells transformers 4.57 which files to copy
    from .image_processing_molmo2 import *  # noqa: F403
    from .molmo2_pixels import *  # noqa: F403
    from .molmo2_video_io import *  # noqa: F403
