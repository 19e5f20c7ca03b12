"""Every fuzzer for a while, each in a process of its own; prints how many inputs it tried.

`MOLMO_FUZZ_S=600` makes it longer, `MOLMO_FUZZ_CORPUS=folder` keeps what was learnt.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

SECONDS = int(os.environ.get("MOLMO_FUZZ_S", "120"))
GRACE_S = 120


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 2 * GRACE_S)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str, tmp_path: Path, show: Callable[..., None]) -> None:
    corpus = Path(os.environ.get("MOLMO_FUZZ_CORPUS", tmp_path)) / name
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(SECONDS)]
    ended = subprocess.run(
        [*command, "--found", str(tmp_path), "--corpus", str(corpus)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS + GRACE_S,
    )

    tried = re.search(r"number_of_executed_units: (\d+)", ended.stderr)
    show(f"{name}: {int(tried[1]) if tried else 0:,} inputs in {SECONDS} s")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert tried is not None
