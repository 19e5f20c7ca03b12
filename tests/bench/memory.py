"""Peak memory and time of a training step over rows of 4,096 to 36,864 tokens with their frames.

A model of tiny widths: what grows with the square of the length is the attention. Each figure is
of a process of its own; memory is what the step takes beyond model and batch. A dense mask of
36,864 tokens does not fit: its values alone are 1.3 GiB, and as numbers that are added 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from molmo_training.compute import ComputeConfig, prepare_blocks
from molmo_training.forward import AttentionKind, Forward
from tests.bench.processes import Row
from tests.support.long_rows import CROP_PX, long_batch, measured_step
from tests.support.ranks import run_ranks
from tests.support.small_model import small_model

LENGTHS: dict[AttentionKind, tuple[int, ...]] = {
    "blocks": (4096, 16_384, 36_864),
    "dense": (4096, 16_384),
}


def rows() -> Iterator[Row]:
    """For each attention and length what a step takes."""
    for attention, lengths in LENGTHS.items():
        for n_tokens in lengths:
            step_mib, step_s = run_ranks(1, measure, attention, n_tokens)
            what = f"a step of {n_tokens} tokens, {attention}"
            yield f"{what}: peak memory", step_mib, "MiB"
            yield f"{what}: time", step_s, "s"


def measure(attention: AttentionKind, n_tokens: int) -> tuple[float, float]:
    """MiB beyond model and batch, seconds."""
    model = small_model(crop_px=CROP_PX)
    prepare_blocks(model, ComputeConfig())
    batch = long_batch(n_tokens)
    step = measured_step(Forward(model, attention=attention), batch)
    return step.step_mib, step.seconds
