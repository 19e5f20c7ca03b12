"""Crops are bytes on their way, and the model gets what it got."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from molmo_core import pixels
from molmo_core.images import prepare_image
from molmo_core.videos import prepare_frames
from molmo_training.data.example import Branch, Example
from molmo_training.data.loader import collate
from molmo_training.data.tokenize import Tokenizing
from molmo_training.pixels import normalised
from tests.training.test_tokenize import branch


def test_every_byte_is_normalised_alike() -> None:
    bytes_ = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    found = normalised(torch.from_numpy(bytes_))
    assert torch.equal(found, torch.from_numpy(pixels.normalised(bytes_)))
    assert (found.min(), found.max()) == (-1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalised(torch.from_numpy(bytes_)), found)


def test_crops_of_a_batch_are_bytes_and_values_those_of_the_server(tokenizing: Tokenizing) -> None:
    rng = np.random.default_rng(5)
    picture = rng.integers(256, size=(150, 260, 3), dtype=np.uint8)
    frames = rng.integers(256, size=(2, 90, 120, 3), dtype=np.uint8)
    branches: tuple[Branch, ...] = (branch("What?", "This."),)
    several = Tokenizing(
        encode=tokenizing.encode,
        images=replace(tokenizing.images, max_crops=4),
        videos=tokenizing.videos,
    )
    image = several(Example(images=[picture], branches=branches))
    video = several(Example(frames=frames, frame_times_s=(0.0, 0.5), branches=branches))
    batch = collate([image, video])
    assert batch.crops.dtype == torch.uint8
    expected = np.concatenate(
        [
            prepare_image(picture, several.images).crops,
            prepare_frames(frames, several.videos).crops,
        ]
    )
    assert torch.equal(normalised(batch.crops), torch.from_numpy(expected))
