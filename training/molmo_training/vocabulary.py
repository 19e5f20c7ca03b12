"""The vocabulary of molmo2-tiny: learnt from what drawn scenes are asked and answered.

Knows: which texts it is learnt from and the file that ships with this package. Does not know:
models; how a vocabulary is learnt and where special tokens stand (`molmo_hf.tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from molmo_hf.tokenizer import build_tokenizer, train_tokenizer, wrap_tokenizer

VOCABULARY_FILE = "tiny_vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer` holds base tokens, padding and the special tokens behind them."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS; special tokens spelt out become themselves."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def for_transformers(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as checkpoints carry it."""
        return wrap_tokenizer(self.tokenizer)


@lru_cache
def load_vocabulary() -> Vocabulary:
    path = files("molmo_training") / VOCABULARY_FILE
    return Vocabulary(Tokenizer.from_str(path.read_text(encoding="utf-8")))


def train_vocabulary(texts: list[str], base_size: int) -> Tokenizer:
    """Learn at most `base_size` tokens, pad to that, add the special tokens of Molmo2 behind."""
    built = build_tokenizer(train_tokenizer(texts, base_size), base_size)
    tokenizer: Tokenizer = built.backend_tokenizer
    return tokenizer


def scene_texts(n_examples: int, seed: int) -> list[str]:
    """Questions and answers of drawn scenes: what the vocabulary is learnt from."""
    from molmo_training.data.scenes import image_example, multi_image_example, video_example
    from molmo_training.recipes.tiny import VIDEOS

    texts = []
    for number in range(n_examples):
        rng = np.random.default_rng([seed, number])
        examples = [image_example(rng), multi_image_example(rng)]
        if number % 10 == 0:
            examples.append(video_example(rng, VIDEOS))
        texts += [turn.text for e in examples for b in e.branches for turn in b.turns]
    return texts + ["user\n", "assistant\n", "Image 1", "subtitle\n"] * n_examples
