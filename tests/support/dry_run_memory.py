"""Trains two steps of molmo2-tiny at two sizes, and tells estimated and measured memory as JSON.

Run as a program of its own: how much the allocator keeps is set by the environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from molmo_training.commands import configured
from molmo_training.launch.memory import estimated
from molmo_training.launch.plan import Plan
from molmo_training.launch.running import train
from tests.support.checkpoint import TINY
from tests.support.peak_memory import count_anew, peak_mib

SIZES = ((384, 8, 1), (1024, 24, 2))
"""Tokens and crops of a pack, packs of a batch."""


def measured(n_tokens: int, n_crops: int, n_packs: int) -> tuple[float, float]:
    """Bytes that are estimated, and the most that came to those that the process began with."""
    settings = (
        "n_steps=2",
        "compute.n_threads=1",
        "compute.autocast_bf16=false",
        "saving.tensorboard=false",
        "saving.is_async=false",
        "data.n_workers=0",
        "data.buffer_size=4",
        "data.held_out.val.n_examples=1",
        f"data.budgets.n_tokens={n_tokens}",
        f"data.budgets.n_crops={n_crops}",
        f"data.packs_per_batch={n_packs}",
        f"data.packs_per_step={n_packs}",
    )
    plan = Plan(configured("sft-debug", settings, init=TINY))
    before = count_anew()
    with tempfile.TemporaryDirectory() as folder:
        train(plan, Path(folder))
    return estimated(plan).together, (peak_mib() - before) * 2**20


if __name__ == "__main__":
    sys.stdout.write(json.dumps([measured(*size) for size in SIZES]))
