"""Vocabularies and geometries: of the tiny recipe, and of the reference's arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_hf.tokenizer import build_tokenizer
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import Weighting
from molmo_training.recipes.tiny import IMAGES, VIDEOS
from molmo_training.vocabulary import load_vocabulary


@pytest.fixture(scope="session")
def tokenizing() -> Tokenizing:
    return Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)


@pytest.fixture(scope="session")
def native_tokenizing() -> Tokenizing:
    """As the rows of tests/golden/native were made."""
    file = Path(__file__).parents[1] / "golden" / "native" / "tokenizer" / "tokenizer.json"
    tokenizer = build_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(file)), 358)
    return Tokenizing(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        images=ImageGeometry(max_crops=8),
        videos=VideoGeometry(),
        weighting=Weighting(root_subsegments=True, root_length=True),
    )
