"""Tokens as cells that can be read: text, id, position, target, weight; visual blocks in rows.

Knows: arrays of an example, how single tokens are spelt. Does not know: HTML, pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from molmo_core.tokens import (
    FRAME_END,
    FRAME_START,
    IM_COL,
    IM_END,
    IM_START,
    LOW_RES_IM_START,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
)
from molmo_training.data.example import Tokenized
from molmo_training.data.tree import PREFIX_SUBSEGMENT

_OPENING, _CLOSING = (LOW_RES_IM_START, IM_START, FRAME_START), (IM_END, FRAME_END)
_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥"}


class Cell(NamedTuple):
    """One token, or a run of the same visual one."""

    text: str
    is_special: bool
    token_id: int
    position: str
    target: str
    weight: float
    shade: float
    """Weight in parts of the example's largest."""
    is_line_end: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cells that stand together; those of a picture have a name and fold."""

    cells: tuple[Cell, ...]
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The tokens of one subsegment."""

    name: str
    number: int
    """Of the branch, from 0; −1: what all branches share."""
    n_tokens: int
    n_learnt: int
    blocks: tuple[Block, ...]


class Speller:
    """Ids as text that shows spaces, line ends, control characters and single bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        own = tokenizer.all_special_tokens
        self._special = frozenset((*own, *SPECIAL_TOKENS, TURN_START, TURN_END))
        self._known: dict[int, str] = {}

    def name(self, token_id: int) -> str:
        """As the vocabulary has it."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def is_special(self, token_id: int) -> bool:
        return self.name(token_id) in self._special

    def __call__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = self._spelt(token_id)
        return self._known[token_id]

    def _spelt(self, token_id: int) -> str:
        name = self.name(token_id)
        if name in self._special:
            return name
        text = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        if "\ufffd" in text and all(letter in self._byte_of for letter in name):
            return "".join(f"\\x{self._byte_of[letter]:02x}" for letter in name)
        return shown_text(text)


def shown_text(text: str) -> str:
    return "".join(
        _VISIBLE.get(letter) or (letter if letter.isprintable() else f"\\u{ord(letter):04x}")
        for letter in text
    )


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def sections_of(row: Tokenized, speller: Speller) -> tuple[Section, ...]:
    """The example part by part: what its branches share, then each of them."""
    largest = float(row.weights.max(initial=0.0)) or 1.0
    n_branches = len({int(s) for s in row.subsegments} - {PREFIX_SUBSEGMENT})
    changes = np.flatnonzero(np.diff(row.subsegments)) + 1
    bounds = [0, *changes.tolist(), len(row.input_ids)]
    sections = []
    for begin, end in pairwise(bounds):
        subsegment = int(row.subsegments[begin])
        is_shared = subsegment == PREFIX_SUBSEGMENT
        branch = f"branch {subsegment + 1} of {n_branches}" if n_branches > 1 else "conversation"
        cells = [_cell(row, place, speller, largest) for place in range(begin, end)]
        sections.append(
            Section(
                name="seen by all branches" if is_shared else branch,
                number=-1 if is_shared else subsegment,
                n_tokens=end - begin,
                n_learnt=int((row.weights[begin:end] > 0).sum()),
                blocks=tuple(_blocks(cells)),
            )
        )
    return tuple(sections)


def _cell(row: Tokenized, place: int, speller: Speller, largest: float) -> Cell:
    token_id, weight = int(row.input_ids[place]), float(row.weights[place])
    return Cell(
        text=speller(token_id),
        is_special=speller.is_special(token_id),
        token_id=token_id,
        position=str(int(row.position_ids[place])),
        target=speller(int(row.targets[place])),
        weight=weight,
        shade=round(weight / largest, 3),
    )


def _blocks(cells: Sequence[Cell]) -> Iterator[Block]:
    plain: list[Cell] = []
    visual: list[Cell] = []
    for cell in cells:
        if visual or (cell.is_special and cell.text in _OPENING):
            if plain:
                yield Block(cells=tuple(plain))
                plain = []
            visual.append(cell)
            if cell.text in _CLOSING:
                yield _folded(visual)
                visual = []
        else:
            plain.append(cell)
    if visual:
        yield _folded(visual)
    if plain:
        yield Block(cells=tuple(plain))


def _folded(cells: Sequence[Cell]) -> Block:
    runs = []
    for _, same in groupby(cells, key=lambda cell: (cell.text, cell.weight)):
        run = list(same)
        first, last = run[0], run[-1]
        is_end = first.text == IM_COL
        if len(run) == 1:
            runs.append(first._replace(is_line_end=is_end))
            continue
        position = f"{first.position}–{last.position}"
        text = f"{first.text} ×{len(run)}"
        runs.append(first._replace(text=text, position=position, target="", is_line_end=is_end))
    return Block(cells=tuple(runs), name=f"{cells[0].text} … {len(cells)} tokens")
