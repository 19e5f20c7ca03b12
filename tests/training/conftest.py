"""A vocabulary and geometries as the tiny recipe has them."""

from __future__ import annotations

import pytest

from molmo_training.data.tokenize import Tokenizing
from molmo_training.recipes.tiny import IMAGES, VIDEOS
from molmo_training.vocabulary import load_vocabulary


@pytest.fixture(scope="session")
def tokenizing() -> Tokenizing:
    return Tokenizing(encode=load_vocabulary().encode, images=IMAGES, videos=VIDEOS)
