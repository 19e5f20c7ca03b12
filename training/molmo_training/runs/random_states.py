"""The states of the random generators of a process, for JSON.

Knows: Python's, numpy's and torch's global generators, and those of the GPUs of this process.
Does not know: generators that somebody made for himself.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Where the generators of this process stand."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": [version, _text(np.asarray(words, dtype=np.uint32)), gauss],
        "numpy": legacy | {"state": legacy["state"] | {"key": _text(legacy["state"]["key"])}},
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": None if device is None else _text(device.numpy()),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators of this process; that of a GPU where there is one in both."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_array(words, np.uint32).tolist()), gauss))
    key = _array(state["numpy"]["state"]["key"], np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))


def seed_new_rank(step: int, rank: int) -> None:
    """For a rank that the saved run did not have."""
    words = np.random.SeedSequence([step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
