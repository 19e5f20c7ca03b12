"""How the processes of a run divide the work: who shares a batch, who holds which weights.

Ranks that follow each other share a batch (context parallelism): these exchange most and should
stand on one machine. Groups of them read different batches. Weights are split over all ranks, or
over the ranks of each replica.

Knows: numbers of ranks, torch's device mesh. Does not know: models, batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from molmo_core.errors import TrainingError

ContextKind = Literal["ulysses", "ring"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    context_degree: int = 1
    """Ranks that share each batch, a part of its positions and crops each."""
    context_kind: ContextKind = "ulysses"
    """What is passed on in attention: all positions of some heads ("ulysses", needs a number of
    heads that the degree divides), or keys and values from rank to rank ("ring")."""
    replicas: int = 1
    """With `shard`: how many times all weights are held, each split over the ranks of a replica;
    1 is FSDP, one a machine is HSDP."""
    shard: Literal["none", "fsdp"] = "none"
    gather_bf16: bool = False
    """With `shard`: gather and use weights in bfloat16, half of the traffic; they are kept, and
    gradients summed, in float32."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands. `dp_rank` says which batches it reads, `cp_rank` which part."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    context_kind: ContextKind = "ulysses"
    gather_bf16: bool = False
    device_type: str = "cpu"
    shared_group: dist.ProcessGroup | None = None
    """The ranks that share this rank's batch; None where it shares with nobody."""
    weights_mesh: DeviceMesh | None = None
    """What weights are split over: all ranks, or replicas and the ranks of each. None: not."""

    @property
    def is_sharded(self) -> bool:
        return self.weights_mesh is not None

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's batch."""
        assert self.shared_group is not None, "a rank that shares with nobody has no group"
        return self.shared_group


ALONE = Mesh()


def make_mesh(config: ParallelConfig, device_type: str = "cpu") -> Mesh:
    """The place of this process, after `init_process_group`; alone without one.

    Raises TrainingError when the numbers do not divide the number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    context, replicas = config.context_degree, config.replicas
    if context < 1 or replicas < 1 or world % (context * replicas):
        raise TrainingError(
            f"{world} processes cannot be divided: context_degree is {context}, replicas "
            f"{replicas}; start a multiple of their product"
        )
    if replicas > 1 and config.shard == "none":
        raise TrainingError(
            f"replicas is {replicas} where shard is 'none': every process holds all weights then; "
            "set shard to 'fsdp' or leave replicas at 1"
        )
    if world == 1:
        return Mesh(context_kind=config.context_kind, device_type=device_type)
    rank = dist.get_rank()
    is_sharded = config.shard == "fsdp"
    return Mesh(
        dp_rank=rank // context,
        dp_size=world // context,
        cp_rank=rank % context,
        cp_size=context,
        context_kind=config.context_kind,
        gather_bf16=config.gather_bf16,
        device_type=device_type,
        shared_group=_shared_group(context) if context > 1 else None,
        weights_mesh=_weights_mesh(world, replicas, device_type) if is_sharded else None,
    )


def _shared_group(degree: int) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_subgroups(degree)[0]  # type: ignore[no-untyped-call]
    return group


def _weights_mesh(world: int, replicas: int, device_type: str) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("weights",))
    return init_device_mesh(
        device_type, (replicas, world // replicas), mesh_dim_names=("replicate", "weights")
    )
