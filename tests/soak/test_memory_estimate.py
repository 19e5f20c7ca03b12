"""The memory that a dry run tells is about what a run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
def test_the_estimate_is_within_a_factor_of_two_of_the_peak_at_two_sizes() -> None:
    # Without reserves of the allocator, so that what is freed is seen.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.dry_run_memory"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    for estimate, peak in (small, large):
        assert 0.5 < estimate / peak < 2, (small, large)
    assert large[0] > 2.5 * small[0]
