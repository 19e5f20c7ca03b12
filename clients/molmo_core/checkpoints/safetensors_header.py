"""The header of a safetensors file: which tensors it holds and where. No tensor is read.

Knows: the format. Does not know: what the tensors are for, torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Name → `dtype`, `shape`, `data_offsets`; and where in the file the offsets count from.

    Raises OSError, and ValueError for what is no header.
    """
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > LONGEST_HEADER:
            raise ValueError(f"its header would have {n_header} bytes")
        try:
            header: Any = json.loads(file.read(n_header))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or not all(isinstance(one, dict) for one in header.values()):
        raise ValueError("its header is no table of tensors")
    header.pop("__metadata__", None)
    return header, 8 + n_header
