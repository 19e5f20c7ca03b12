"""Trains two steps of molmo2-tiny at two sizes, and tells estimated and measured memory as JSON.

Run as a program of its own: the most memory that a process had is never forgotten.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from molmo_training.commands import configured
from molmo_training.launch.memory import estimated
from molmo_training.launch.plan import Plan
from molmo_training.launch.running import train

SIZES = ((384, 8, 1), (1024, 24, 2))
"""Tokens and crops of a pack, packs of a batch; the smaller one first."""


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
    start = Path(str(files("molmo_hf") / "checkpoints" / "molmo2-tiny"))
    plan = Plan(configured("sft-debug", settings, init=start))
    before = _resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        train(plan, Path(folder))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return estimated(plan).together, most - before


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps([measured(*size) for size in SIZES]))
