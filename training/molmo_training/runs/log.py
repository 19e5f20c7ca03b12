"""The log of a run: `log.jsonl` in its folder, one line of figures at a time.

Knows: the file. Does not know: what the figures are of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"


def append_figures(folder: Path, line: Mapping[str, float]) -> None:
    """Add one line to the log of the run in `folder`, and say it."""
    with (folder / LOG_FILE).open("a") as log:
        log.write(json.dumps(line) + "\n")
    logger.info("%s", line)
