"""Special tokens of Molmo2: spelling, order and meaning.

Knows: the 14 extra tokens, that their ids are `base + index` behind the base vocabulary, and the
chat markers. Does not know: tokenizers. Source: released Molmo2 checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

IM_START = "<im_start>"  # opens the high-resolution crops of an image
IM_END = "<im_end>"  # closes an image block (low and high resolution)
IM_PATCH = "<im_patch>"  # one pooled visual feature is added here
IM_COL = "<im_col>"  # ends a row of patches
LOW_RES_IM_START = "<low_res_im_start>"  # opens the view of the whole image
IMAGE = "<|image|>"  # placeholder in chat text
IM_LOW = "<im_low>"  # low-resolution patch: not used by Molmo2
FRAME_START = "<frame_start>"
FRAME_END = "<frame_end>"
VIDEO = "<|video|>"  # placeholder in chat text

SPECIAL_TOKENS: tuple[str, ...] = (
    IM_START,
    IM_END,
    IM_PATCH,
    IM_COL,
    LOW_RES_IM_START,
    IMAGE,
    IM_LOW,
    FRAME_START,
    FRAME_END,
    VIDEO,
    "<|points|>",  # this and the next three: MolmoPoint only
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
)
"""In id order: token i has id `base_vocab_size + i`."""

ADDITIONAL_VOCAB_SIZE = 128
"""Embedding rows behind the base vocabulary; only the first 14 are used, none can be predicted."""

VISUAL_TOKENS: tuple[str, ...] = (
    IM_PATCH,
    IM_COL,
    IM_START,
    LOW_RES_IM_START,
    FRAME_START,
    IM_END,
    FRAME_END,
    IM_LOW,
)
"""Tokens that see each other in both directions when the model is bidirectional."""

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

_CONTROL = re.compile(
    "|".join(re.escape(t) for t in (*SPECIAL_TOKENS, TURN_START, TURN_END, END_OF_TEXT))
    + r"|\|<EXTRA_TOKENS_\d+>\|"
)


def find_control_token(text: str) -> str | None:
    """Return the first control token spelt out in `text`, or None.

    User text must not contain one: the tokenizer would turn it into the token itself.
    """
    if "<" not in text:  # every one of them has it, and looking for one character is quick
        return None
    match = _CONTROL.search(text)
    return match.group() if match else None


def filler_token(index: int) -> str:
    """Name of the `index`-th token that pads a tokenizer to the model's base vocabulary."""
    return f"|<EXTRA_TOKENS_{index}>|"


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the special tokens of a model whose base vocabulary has `base_vocab_size` rows."""

    base_vocab_size: int

    def __getitem__(self, token: str) -> int:
        return self.base_vocab_size + SPECIAL_TOKENS.index(token)

    @property
    def visual(self) -> frozenset[int]:
        return frozenset(self[t] for t in VISUAL_TOKENS)
