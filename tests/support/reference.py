"""The plain forward of `molmo_hf` over a conversation: what an engine must reproduce."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from molmo_core.images import ImageGeometry, image_tokens, prepare_image
from molmo_core.prompts import render_chat
from molmo_core.tokens import IMAGE, TURN_END, VIDEO
from molmo_core.videos import VideoGeometry, prepare_frames, probe_video, sample_times, video_text
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.video_io import decode_frames
from molmo_server.media.options import image_geometry, video_geometry
from tests.support.conversations import Conversation

BOS = TURN_END
"""Checkpoints without a token for it begin with EOS."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    ids: list[int]
    media: dict[str, torch.Tensor]


class Reference:
    """A checkpoint's model in float32 on one thread of plain PyTorch."""

    def __init__(self, checkpoint: Path) -> None:
        fields = json.loads((checkpoint / "config.json").read_text())
        self.model = Molmo2ForConditionalGeneration(Molmo2Config(**fields)).eval()
        weights = load_file(checkpoint / "model.safetensors")
        weights.setdefault("lm_head.weight", weights["model.transformer.wte.embedding"])
        self.model.load_state_dict(weights)
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._known: dict[tuple[Conversation, tuple[int, ...]], tuple[list[int], torch.Tensor]] = {}

    def inputs(self, conversation: Conversation) -> Inputs:
        """Token ids with BOS, and the tensors of the media."""
        text = render_chat(
            conversation.turns,
            n_images=len(conversation.images),
            n_videos=int(conversation.video is not None),
            subtitles=conversation.subtitles,
        )
        media: dict[str, torch.Tensor] = {}
        if conversation.images:
            images = image_geometry(ImageGeometry(), conversation.options)
            text, media = _with_images(text, conversation.images, images)
        if conversation.video is not None:
            video = video_geometry(VideoGeometry(), conversation.options)
            text, media = _with_video(text, conversation.video, video)
        ids = self.tokenizer.encode(BOS + text, add_special_tokens=False).ids
        return Inputs(ids=ids, media=media)

    def continued(
        self, conversation: Conversation, answer: list[int]
    ) -> tuple[list[int], torch.Tensor]:
        """The prompt's ids; (tokens, base vocabulary): row t is the distribution of token t + 1.

        The rows of prompt and answer together; remembered, as most answers come more than once.
        """
        key = (conversation, tuple(answer))
        if key not in self._known:
            inputs = self.inputs(conversation)
            self._known[key] = inputs.ids, self._logprobs(inputs, answer)
        return self._known[key]

    @torch.no_grad()
    def _logprobs(self, inputs: Inputs, answer: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([inputs.ids + answer]), **inputs.media).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


def _with_images(
    text: str, files: tuple[bytes, ...], geometry: ImageGeometry
) -> tuple[str, dict[str, torch.Tensor]]:
    prepared = [
        prepare_image(np.asarray(Image.open(io.BytesIO(f)).convert("RGB")), geometry) for f in files
    ]
    for image in prepared:
        text = text.replace(IMAGE, "".join(image_tokens(image.grid, geometry)), 1)
    return text, _tensors(
        pixel_values=np.concatenate([p.crops for p in prepared]),
        image_token_pooling=np.concatenate([p.pooling for p in prepared]),
        image_grids=np.array([p.grid for p in prepared]),
        image_num_crops=np.array([len(p.crops) for p in prepared]),
    )


def _with_video(
    text: str, file: bytes, geometry: VideoGeometry
) -> tuple[str, dict[str, torch.Tensor]]:
    """As in training: a part of a file is a clip of its own, whose times begin at 0."""
    info = probe_video(file)
    start_s = geometry.start_s
    end_s = min(geometry.end_s or info.duration_s, info.duration_s)
    times = sample_times(end_s - start_s, geometry, source_fps=info.fps)
    frames = decode_frames(file, [start_s + time_s for time_s in times])
    prepared = prepare_frames(frames, geometry)
    text = text.replace(VIDEO, video_text(times, geometry), 1)
    return text, _tensors(
        pixel_values_videos=prepared.crops,
        video_token_pooling=prepared.pooling,
        video_grids=np.array([[len(times), geometry.frame_rows, geometry.frame_cols]]),
    )


def _tensors(**arrays: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
