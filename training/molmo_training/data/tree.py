"""Message trees as arrays: branches behind a shared prefix, what is learnt and how much.

Targets are shifted: position s predicts `targets[s]`. Each branch's positions go on from the
prefix; its last token predicts the end, weighted as the token before it.
Knows: token ids, branches, weights. Does not know: text, media.
Source: spec of Molmo2's training, sections 4.3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidExample

PREFIX_SUBSEGMENT = 10_000
"""Sub-segment id of the tokens that all branches see."""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How answers share the loss."""

    root_subsegments: bool = False
    """Divide by √(branches kept): a picture with many questions counts less than their sum."""
    root_length: bool = False
    """Multiply by 2/√(answer tokens): a long answer counts less than its length."""


UNWEIGHTED = Weighting()


@dataclass(frozen=True, kw_only=True)
class TokenBranch:
    """A conversation in pieces of token ids, each learnt or not."""

    pieces: Sequence[tuple[Sequence[int], bool]]
    factor: float = 1.0
    weighting: Weighting = UNWEIGHTED
    mark: int = 0
    """Whatever the answer's tokens are marked with in `Tree.marks`."""

    @property
    def ids(self) -> list[int]:
        return [token for tokens, _ in self.pieces for token in tokens]

    @property
    def is_learnt(self) -> list[bool]:
        return [learnt for tokens, learnt in self.pieces for _ in tokens]


@dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """None: no limit. A branch but the first is dropped if no answer token of it fits."""

    max_tokens: int | None = None


UNLIMITED = TreeLimits()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """(S,) each; `is_cut`: not all that the branches have to teach lies within the limits."""

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    subsegments: NDArray[np.int64]
    marks: NDArray[np.int64]
    is_cut: bool


def build_tree(
    prefix: Sequence[int],
    branches: Sequence[TokenBranch],
    eos: int,
    limits: TreeLimits = UNLIMITED,
) -> Tree:
    """Lay the branches behind the prefix, which begins with BOS and is never learnt.

    Raises InvalidExample when the prefix does not fit, or nothing is left to be learnt.
    """
    kept = _fitting(len(prefix), branches, limits)
    ids, weights = list(prefix), [0.0] * len(prefix)
    targets = [*prefix[1:], kept[0].ids[0]]
    positions = list(range(len(prefix)))
    subsegments, marks = [PREFIX_SUBSEGMENT] * len(prefix), [0] * len(prefix)
    for number, branch in enumerate(kept):
        b_ids, is_learnt = branch.ids, branch.is_learnt
        weight = _token_weight(branch, is_learnt, n_kept=len(kept), is_tree=len(branches) > 1)
        b_weights = [weight if learnt else 0.0 for learnt in is_learnt]
        ids += b_ids
        targets += [*b_ids[1:], eos]
        weights += [*b_weights[1:], b_weights[-1]]
        positions += range(len(prefix), len(prefix) + len(b_ids))
        subsegments += [number] * len(b_ids)
        marks += [branch.mark if learnt else 0 for learnt in is_learnt]
    end = limits.max_tokens
    if not any(weights[:end]):
        raise InvalidExample(
            f"no token of an answer lies within the {end} tokens of a sequence: "
            "shorten the question or allow longer sequences"
        )
    return Tree(
        input_ids=np.array(ids[:end], dtype=np.int64),
        targets=np.array(targets[:end], dtype=np.int64),
        weights=np.array(weights[:end], dtype=np.float32),
        position_ids=np.array(positions[:end], dtype=np.int64),
        subsegments=np.array(subsegments[:end], dtype=np.int64),
        marks=np.array(marks[:end], dtype=np.int64),
        is_cut=len(kept) < len(branches) or (end is not None and len(ids) > end),
    )


def _fitting(
    n_prefix: int, branches: Sequence[TokenBranch], limits: TreeLimits
) -> list[TokenBranch]:
    """The branches of which an answer token lies within the limits; the first in any case."""
    if limits.max_tokens is not None and n_prefix > limits.max_tokens:
        raise InvalidExample(
            f"the media take {n_prefix} tokens, a sequence has {limits.max_tokens}: "
            "use fewer or smaller media, or longer sequences"
        )
    kept: list[TokenBranch] = []
    n_text = 0
    for branch in branches:
        is_learnt = branch.is_learnt
        if not is_learnt or is_learnt[0] or not is_learnt[-1]:
            raise InvalidExample(
                "a conversation goes from a question to an answer that is not empty: give both"
            )
        first_learnt = n_text + is_learnt.index(True)
        is_over = limits.max_tokens is not None and n_prefix + first_learnt >= limits.max_tokens
        if kept and is_over:
            continue
        kept.append(branch)
        n_text += len(is_learnt)
    if not kept:
        raise InvalidExample("an example without a question: give it a branch")
    return kept


def _token_weight(
    branch: TokenBranch, is_learnt: Sequence[bool], *, n_kept: int, is_tree: bool
) -> float:
    weight = branch.factor
    if branch.weighting.root_length:
        # As trained: one conversation counts its end token, the branches of a tree do not.
        weight *= 2 / sqrt(sum(is_learnt) + (not is_tree))
    if branch.weighting.root_subsegments:
        weight /= sqrt(n_kept)
    return weight
