"""The log of a run: `log.jsonl` in its folder, one line of figures at a time.

Knows: the file. Does not know: what the figures are of.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"


def append_figures(folder: Path, line: Mapping[str, float]) -> None:
    """Add one line to the log of the run in `folder`, and say it."""
    JsonLines(folder).write(line)
    logger.info("%s", line)


class JsonLines:
    """The log as a place that figures are written to. What is no number becomes null."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_FILE

    def write(self, line: Mapping[str, float]) -> None:
        plain = {k: v if math.isfinite(v) else None for k, v in line.items()}
        with self.path.open("a") as log:
            log.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Every line is in the file already."""

    def cut_after(self, step: int) -> None:
        """Leave out what was logged after `step`: a run that goes on there logs it again."""
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if (read := _read(line)) and read.get("step", 0) <= step]
        if len(kept) < len(lines):
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept))
            os.replace(partial, self.path)


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log; none where there is no log. A line that was cut is left out."""
    path = folder / LOG_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [read for line in lines if (read := _read(line)) is not None]


def _read(line: str) -> dict[str, Any] | None:
    try:
        read = json.loads(line)
    except ValueError:
        return None
    return read if isinstance(read, dict) else None
