"""The vocabulary of molmo2-tiny: a byte-level BPE over what drawn scenes are asked and answered.

Knows: that every digit is a token of its own (coordinates are read digit by digit) and that any
text can be encoded (bytes). Does not know: models. The file it builds ships with this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from molmo_core.tokens import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START, filler_token

VOCABULARY_FILE = "tiny_vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@lru_cache
def load_vocabulary() -> Vocabulary:
    path = files("molmo_training") / VOCABULARY_FILE
    return Vocabulary(Tokenizer.from_str(path.read_text(encoding="utf-8")))


def train_vocabulary(texts: list[str], base_size: int) -> Tokenizer:
    """Learn `base_size` tokens, then add the special tokens of Molmo2 behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = base_size - tokenizer.get_vocab_size()
    extra = [filler_token(i) for i in range(missing)] + list(SPECIAL_TOKENS)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra])
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
