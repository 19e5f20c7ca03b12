"""Small random models of transformers in folders, as a hub holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.support.pretrained import save_pretrained


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """`save(kind, **fields of the configuration)` → folder and model."""

    def save_model(kind: str, **fields: Any) -> tuple[Path, PreTrainedModel]:
        return tmp_path / kind, save_pretrained(tmp_path / kind, kind, **fields)

    return save_model
