"""Building Molmo2's tokenizer: a base vocabulary, padding up to the model's rows, special tokens.

Knows: which token must have which id, and what both transformers 5 and 4.57 can read.
Does not know: prompts, models. Source: layout of the released checkpoints' tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molmo_core.errors import CheckpointError
from molmo_core.tokens import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    SpecialIds,
    filler_token,
)

CONTROLS = (END_OF_TEXT, TURN_START, TURN_END)
"""First ids, in this order, of a vocabulary trained here."""

_LONGEST_PROMPT = 1_000_000_000  # the model's config says it; 4.57 warns beyond this number


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is a token of its own.

    Coordinates and times are numbers: single digits keep them regular. The vocabulary holds the
    controls, the 256 bytes and at most `vocab_size` tokens in all.
    Raises ValueError when `vocab_size` has no room for controls and bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(CONTROLS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; it holds {smallest} controls and bytes at the least"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROLS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def build_tokenizer(base: PreTrainedTokenizerFast, base_vocab_size: int) -> PreTrainedTokenizerFast:
    """Pad a base tokenizer to the model's rows and put the special tokens behind them.

    `base_vocab_size` is the number of rows of the base embedding; `base` keeps its ids and its
    BOS, if it has one. EOS is `<|im_end|>`, padding `<|endoftext|>`, on the left.
    Raises CheckpointError when the base does not fit or lacks the chat controls.
    """
    tokenizer = Tokenizer.from_str(base.backend_tokenizer.to_str())
    n_base = tokenizer.get_vocab_size(with_added_tokens=True)
    missing = [t for t in (END_OF_TEXT, TURN_START, TURN_END) if tokenizer.token_to_id(t) is None]
    if missing or n_base > base_vocab_size:
        raise CheckpointError(
            f"the base tokenizer has {n_base} tokens and lacks {missing}; allowed are at most "
            f"{base_vocab_size} tokens with {list(CONTROLS)}: take the tokenizer of the decoder"
        )
    fillers = [filler_token(k) for k in range(base_vocab_size - n_base)]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (*fillers, *SPECIAL_TOKENS)]
    )
    built = wrap_tokenizer(tokenizer, bos_token=base.bos_token)
    check_tokenizer(built, base_vocab_size)
    return built


def check_tokenizer(tokenizer: Any, base_vocab_size: int) -> None:
    """Raise CheckpointError unless the special tokens have the ids that the model expects."""
    ids = SpecialIds(base_vocab_size=base_vocab_size)
    found = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    wrong = {t: i for t, i in found.items() if i != ids[t]}
    if wrong or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"the tokenizer gives {wrong or 'no EOS or padding token'}; the special tokens must "
            f"have the ids {base_vocab_size} to {base_vocab_size + len(SPECIAL_TOKENS) - 1} and "
            "EOS and padding must be set: build it with molmo_hf.build_tokenizer"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers 4.57 and 5 both read them.

    transformers 5 would name a class and a list of tokens that 4.57 does not understand.
    """
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _LONGEST_PROMPT,
        "processor_class": "Molmo2Processor",
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def wrap_tokenizer(
    tokenizer: Tokenizer, *, bos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """As transformers takes it: EOS `<|im_end|>`, padding `<|endoftext|>` on the left."""
    bos = {} if bos_token is None else {"bos_token": bos_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **bos,
    )
