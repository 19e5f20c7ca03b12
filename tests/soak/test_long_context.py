"""A step of 36,864 tokens and 384 frames at full size, shared by four processes over gloo.

Tiny widths, real lengths. Loss and gradients are those of one process; prints time and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch.distributed as dist
from torch import Tensor

from molmo_training import ranks
from molmo_training.compute import ComputeConfig, prepare_blocks
from molmo_training.forward import Forward
from molmo_training.parallel.mesh import ContextKind, ParallelConfig, make_mesh
from molmo_training.parallel.shared_batches import shared_batches
from tests.support.long_rows import CROP_PX, long_batch, measured_step
from tests.support.ranks import gathered, run_ranks
from tests.support.small_model import small_model

N_TOKENS, N_FRAMES = 36_864, 384


@dataclass(frozen=True, kw_only=True)
class Figures:
    loss: float
    gradients: dict[str, Tensor]
    seconds: float
    """Of forward and backward pass."""
    step_mib: list[float]
    """Of each rank: the most memory beyond model and batch."""
    n_crops: list[int]
    """Encoded by each rank."""

    def __str__(self) -> str:
        memory = ", ".join(f"{mib:.0f}" for mib in self.step_mib)
        return f"{self.seconds:.1f} s, MiB of the step by rank: {memory}"


def long_step(kind: ContextKind) -> Figures:
    config = ParallelConfig(context_degree=dist.get_world_size(), context_kind=kind)
    mesh = make_mesh(config)
    (batch,) = shared_batches([long_batch(N_TOKENS)] if mesh.cp_rank == 0 else None, mesh)
    assert batch.input_ids.shape == (1, N_TOKENS)
    assert len(batch.crops) == N_FRAMES
    model = small_model(crop_px=CROP_PX)
    prepare_blocks(model, ComputeConfig())
    forward = Forward(model, mesh=mesh)
    dist.barrier()
    step = measured_step(forward, batch)
    ranks.sum_gradients(list(model.parameters()))
    return Figures(
        loss=float(ranks.sum_over_ranks(step.loss)),
        gradients={name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        seconds=step.seconds,
        step_mib=gathered(step.step_mib),
        n_crops=gathered(len(step.decoded.patches)),
    )


@pytest.fixture(scope="module")
def alone(show: Callable[..., None]) -> Figures:
    figures: Figures = run_ranks(1, long_step, "ulysses")
    show(f"one process: {figures}")
    return figures


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_four_processes_share_a_long_row(
    kind: ContextKind, alone: Figures, show: Callable[..., None]
) -> None:
    shared: Figures = run_ranks(4, long_step, kind)
    show(f"four processes, {kind}: {shared}")
    assert shared.n_crops == [N_FRAMES // 4] * 4
    assert abs(shared.loss - alone.loss) < 1e-5
    for name, gradient in alone.gradients.items():
        assert (shared.gradients[name] - gradient).abs().max() < 1e-5, name
    # Of tiny widths a part is of no rank's share: libraries, buffers of gloo.
    assert max(shared.step_mib) < 0.65 * max(alone.step_mib)
