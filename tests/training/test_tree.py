"""Message trees and loss weights, on the toy ids of the training specification, appendix A.4."""

from __future__ import annotations

import pytest

from molmo_core.errors import InvalidExample
from molmo_core.prompts import Turn
from molmo_training.data.tokenize import turn_text
from molmo_training.data.tree import (
    PREFIX_SUBSEGMENT,
    UNWEIGHTED,
    TokenBranch,
    TreeLimits,
    Weighting,
    build_tree,
)

EOS = 1
VISUAL = [9000, 9002, 9002, 9001]
PREFIX = [EOS, *VISUAL]
BOTH_ROOTS = Weighting(root_subsegments=True, root_length=True)


def branch(*messages: str, weighting: Weighting = UNWEIGHTED, factor: float = 1.0) -> TokenBranch:
    """Questions and answers in turn, a letter a token; EOS after each answer but the last."""
    pieces = []
    for k, message in enumerate(messages):
        is_inner_answer = k % 2 == 1 and k + 1 < len(messages)
        ids = [100 + ord(c) for c in message] + [EOS] * is_inner_answer
        pieces.append((ids, k % 2 == 1))
    return TokenBranch(pieces=pieces, weighting=weighting, factor=factor)


def two(weighting: Weighting = UNWEIGHTED, factor: float = 1.0) -> list[TokenBranch]:
    options = {"weighting": weighting, "factor": factor}
    return [branch("a", "b", **options), branch("c", "de", **options)]


def test_a_conversation() -> None:
    tree = build_tree(PREFIX, [branch("ab", "cd")], EOS)
    assert tree.input_ids.tolist() == [*PREFIX, 197, 198, 199, 200]
    assert tree.targets.tolist() == [*VISUAL, 197, 198, 199, 200, EOS]
    assert tree.weights.tolist() == [0] * 6 + [1, 1, 1]
    assert tree.position_ids.tolist() == list(range(9))


def test_a_tree() -> None:
    tree = build_tree(PREFIX, two(), EOS)
    assert tree.input_ids.tolist() == [*PREFIX, 197, 198, 199, 200, 201]
    assert tree.targets.tolist() == [*VISUAL, 197, 198, EOS, 200, 201, EOS]
    assert tree.weights.tolist() == [0] * 5 + [1] * 5
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert tree.subsegments.tolist() == [PREFIX_SUBSEGMENT] * 5 + [0, 0, 1, 1, 1]
    assert PREFIX_SUBSEGMENT == 10_000


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        (two(BOTH_ROOTS), [0] * 5 + [1.4142] * 2 + [1.0] * 3),
        ([branch("ab", "cd", weighting=BOTH_ROOTS)], [0] * 6 + [1.1547] * 3),
        (two(factor=0.2), [0] * 5 + [0.2] * 5),
        (two(Weighting(root_subsegments=True)), [0] * 5 + [0.7071] * 5),
        (two(Weighting(root_length=True), factor=0.5), [0] * 5 + [1.0] * 2 + [0.7071] * 3),
    ],
)
def test_weights(branches: list[TokenBranch], expected: list[float]) -> None:
    assert build_tree(PREFIX, branches, EOS).weights.tolist() == pytest.approx(expected, abs=1e-4)


def test_every_answer_of_a_conversation_learns_its_end() -> None:
    tree = build_tree([EOS], [branch("a", "b", "c", "d")], EOS)
    assert tree.input_ids.tolist() == [EOS, 197, 198, EOS, 199, 200]
    assert tree.targets.tolist() == [197, 198, EOS, 199, 200, EOS]
    assert tree.weights.tolist() == [0, 1, 1, 0, 1, 1]


def test_what_does_not_fit_is_dropped_and_does_not_count() -> None:
    roots = Weighting(root_subsegments=True)
    long = branch("x" * 9, "y", weighting=roots)
    kept = build_tree(PREFIX, [*two(roots), long], EOS, TreeLimits(max_tokens=19))
    assert kept.subsegments[-1] == 1
    assert kept.weights.max() == pytest.approx(2**-0.5)
    assert build_tree(PREFIX, [*two(), long], EOS, TreeLimits(max_tokens=20)).subsegments[-1] == 2
    text = build_tree(PREFIX, [*two(roots), long], EOS, TreeLimits(max_text_tokens=14))
    assert text.subsegments[-1] == 1
    # A tree of which one branch is left is weighted as a tree: its end is not counted.
    alone = build_tree(PREFIX, two(BOTH_ROOTS), EOS, TreeLimits(max_text_tokens=2))
    assert alone.weights.max() == pytest.approx(2.0)


def test_an_answer_is_cut_at_the_end_of_the_sequence() -> None:
    tree = build_tree(PREFIX, [branch("a", "bcdef")], EOS, TreeLimits(max_tokens=8))
    assert tree.input_ids.tolist() == [*PREFIX, 197, 198, 199]
    assert tree.targets.tolist()[-1] == 200
    assert tree.weights.tolist() == [0] * 5 + [1, 1, 1]


@pytest.mark.parametrize(
    ("branches", "max_tokens", "message"),
    [
        ([branch("a", "b")], 4, "media take 5 tokens"),
        ([branch("abcd", "e")], 8, "no token of an answer"),
        ([branch("a", "")], None, "goes from a question to an answer"),
        ([branch("", "b")], None, "goes from a question to an answer"),
        ([branch("a")], None, "goes from a question to an answer"),
        ([], None, "without a question"),
    ],
)
def test_nothing_to_learn(
    branches: list[TokenBranch], max_tokens: int | None, message: str
) -> None:
    with pytest.raises(InvalidExample, match=message):
        build_tree(PREFIX, branches, EOS, TreeLimits(max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("message_format", "expected"),
    [
        (
            "qwen3",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n|a|"
            "<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("role", "User: q Assistant:| a| User: r Assistant:"),
        ("none", "q| a| r"),
    ],
)
def test_message_formats(message_format: str, expected: str) -> None:
    turns = [Turn(role="user", text="q"), Turn(role="assistant", text="a")]
    turns.append(Turn(role="user", text="r"))
    written = [turn_text(t, k, message_format) for k, t in enumerate(turns)]
    assert "|".join(written) == expected
