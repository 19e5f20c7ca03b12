"""Rows against the arrays that the reference made of them (tests/golden/native)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from molmo_training.data.example import Tokenized
from molmo_training.data.formatting import FormatSettings, Formatter, RowMedia
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import PREFIX_SUBSEGMENT

NATIVE = Path(__file__).parents[2] / "golden" / "native"
CASES: dict[str, dict[str, Any]] = json.loads((NATIVE / "cases.json").read_text())
BASE_VOCABULARY = 358
N_PATCHES = 729


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[Any]]:
    return load_file(NATIVE / "reference.safetensors")


def formatted(name: str, tokenizing: Tokenizing) -> Tokenized:
    case = CASES[name]
    pixels = np.asarray(Image.open(NATIVE / case["image"]).convert("RGB"))
    formatter = Formatter(settings=FormatSettings(prompt_templates="none"))
    row = {"message_list": case["annotations"]}
    return tokenizing(formatter(row, np.random.default_rng(0), RowMedia(images=[pixels])))


@pytest.mark.parametrize("name", CASES)
def test_arrays_are_those_of_the_reference(
    name: str, arrays: dict[str, NDArray[Any]], native_tokenizing: Tokenizing
) -> None:
    row = formatted(name, native_tokenizing)
    expected = {key.removeprefix(f"{name}."): a for key, a in arrays.items() if name in key}
    n_prefix = int((row.subsegments == PREFIX_SUBSEGMENT).sum())
    assert row.input_ids[:n_prefix].tolist() == expected["input_tokens"][:n_prefix].tolist()
    assert row.targets[:n_prefix].tolist() == expected["target_tokens"][:n_prefix].tolist()
    assert not expected["loss_masks"][:n_prefix].any()
    # The order of branches is drawn: each must be one of the reference's.
    ours = sorted(branches_of(_as_reference(row)))
    theirs = sorted(branches_of(expected))
    assert [b[:3] for b in ours] == [b[:3] for b in theirs]
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our[3], their[3], rtol=1e-6)
    assert len(row.input_ids) == len(expected["input_tokens"])
    assert row.weights.sum() == pytest.approx(CASES[name]["weight_sum"], rel=1e-5)
    assert row.pooling.tolist() == _pooling_of_shared_tile(expected["token_pooling"], row)


def _as_reference(row: Tokenized) -> dict[str, NDArray[Any]]:
    return {
        "input_tokens": row.input_ids,
        "target_tokens": row.targets,
        "loss_masks": row.weights,
        "position_ids": row.position_ids,
        "subsegment_ids": row.subsegments,
    }


def branches_of(arrays: dict[str, NDArray[Any]]) -> Iterator[tuple[list[Any], ...]]:
    """(ids, targets, positions, weights) of each branch; without sub-segments there is one."""
    ids = arrays["input_tokens"]
    subsegments = arrays.get("subsegment_ids")
    if subsegments is None:
        subsegments = np.zeros(len(ids), dtype=np.int64)
        subsegments[: int((ids >= BASE_VOCABULARY).nonzero()[0][-1]) + 1] = PREFIX_SUBSEGMENT
    for number in sorted(set(subsegments.tolist()) - {PREFIX_SUBSEGMENT}):
        inside = subsegments == number
        keys = ("input_tokens", "target_tokens", "position_ids", "loss_masks")
        yield tuple(arrays[key][inside].tolist() for key in keys)


def _pooling_of_shared_tile(expected: NDArray[Any], row: Tokenized) -> list[list[int]]:
    """The reference computes the one tile of a small picture twice; we point at the first."""
    if len(row.crops) == 1:
        expected = np.where(expected >= N_PATCHES, expected - N_PATCHES, expected)
    joined: list[list[int]] = expected.tolist()
    return joined


def test_the_order_of_branches_is_drawn_and_repeats(native_tokenizing: Tokenizing) -> None:
    row = {"message_list": CASES["olmo3.0"]["annotations"]}
    formatter = Formatter(settings=FormatSettings(prompt_templates="none"))
    media = RowMedia(images=[np.zeros((10, 10, 3), np.uint8)])
    drawn = [
        tuple(b.turns[0].text for b in formatter(row, np.random.default_rng(k), media).branches)
        for k in range(20)
    ]
    assert len(set(drawn)) > 1
    assert {tuple(sorted(order)) for order in drawn} == {tuple(sorted(drawn[0]))}
    again = formatter(row, np.random.default_rng(3), media)
    assert tuple(b.turns[0].text for b in again.branches) == drawn[3]
