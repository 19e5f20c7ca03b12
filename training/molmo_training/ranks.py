"""The processes of a run: how they start, sum figures and gradients.

Knows: `torchrun`'s environment, torch.distributed. Does not know: models, data, losses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_BUCKET_SIZE = 1 << 25
"""Gradients that are sent at a time: 128 MiB in float32."""
_PATIENCE = timedelta(minutes=30)
"""Ranks wait for each other's part of a step."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device_type: str) -> Iterator[int]:
    """Join the others that `torchrun` started; alone without it. Gives the rank on this machine."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield 0
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    # With both, states on the CPU can be gathered while the GPUs compute.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield local_rank
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, on each of them; in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all ranks, but those of sharded parameters, which sum their own.

    A parameter without a gradient on some ranks has one afterwards if any rank has.
    """
    if world_size() == 1:
        return
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if not plain:
        return
    has = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32)
    has = has.to(plain[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    summed = [p for p, some in zip(plain, has.tolist(), strict=True) if some]
    for bucket in _buckets([_gradient(p) for p in summed]):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [g.numel() for g in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type, together of about the bucket's size."""
    for _, same in groupby(gradients, key=lambda g: g.dtype):
        bucket: list[Tensor] = []
        for gradient in same:
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= _BUCKET_SIZE:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
