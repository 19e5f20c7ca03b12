"""Native checkpoints as the reference wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "golden" / "native"


@pytest.fixture(scope="session")
def native() -> Path:
    """`olmo3` (sharded), `qwen3_tied-unsharded`, `tokenizer`, `cases.json`, `media`."""
    return NATIVE
