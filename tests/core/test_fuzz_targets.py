"""Targets of the fuzzers on their seeds, on seeds that were damaged, and on all that was found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

FOUND = Path(__file__).parents[1] / "golden" / "fuzz"
N_DAMAGED = {"video": 60, "data_url": 60}


def damaged(seed: bytes, rng: random.Random) -> bytes:
    """`seed` cut, with a piece twice, or with bytes changed."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        match rng.randrange(4):
            case 0:
                del data[end:]
            case 1:
                data[start:start] = data[start:end]
            case 2:
                data[start : start + 1] = rng.randbytes(rng.randrange(9))
            case 3 if data:
                data[start % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_whole_and_damaged(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for seed in seeds:
        target.check(seed)
    for _ in range(N_DAMAGED.get(name, 300)):
        target.check(damaged(rng.choice(seeds), rng))


@pytest.mark.parametrize("name", sorted(path.name for path in FOUND.iterdir()))
def test_what_was_found_before(name: str) -> None:
    found = sorted((FOUND / name).iterdir())
    assert found
    for path in found:
        TARGETS[name].check(path.read_bytes())
