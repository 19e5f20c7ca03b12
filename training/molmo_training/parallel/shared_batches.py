"""One reader for all ranks that share a batch: the first reads, the others are sent what it reads.

Knows: `Batch`, the group. Does not know: where batches come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo_core.errors import MolmoError
from molmo_training.data.example import Batch
from molmo_training.parallel.mesh import Mesh


def shared_batches(batches: Iterable[Batch] | None, mesh: Mesh) -> Iterator[Batch]:
    """The batches of the first rank of this rank's group, on all of them.

    `batches` is None on the others. Their end, and an error of ours on the way, reach all ranks.
    """
    if mesh.cp_size == 1:
        assert batches is not None, "a rank that shares with nobody reads itself"
        yield from batches
        return
    sender = dist.get_global_rank(mesh.cp_group, 0)
    source = iter(batches or ())
    while True:
        batch, failure = None, None
        if mesh.cp_rank == 0:
            try:
                batch = next(source, None)
            except MolmoError as error:
                failure = error
        header = [(_header(batch), failure)]
        dist.broadcast_object_list(header, src=sender, group=mesh.cp_group)
        described, failure = header[0]
        if failure is not None:
            raise failure
        if described is None:
            return
        yield _sent(described, batch, mesh, sender)


def _header(batch: Batch | None) -> dict[str, Any] | None:
    """Shapes and types of the tensors of a batch, other fields as they are."""
    if batch is None:
        return None
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _sent(header: dict[str, Any], batch: Batch | None, mesh: Mesh, sender: int) -> Batch:
    values: dict[str, Any] = {}
    for name, what in header.items():
        if not isinstance(what, tuple):
            values[name] = what
            continue
        shape, dtype = what
        if batch is None:
            tensor = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        else:
            tensor = getattr(batch, name).to(mesh.device_type).contiguous()
        dist.broadcast(tensor, src=sender, group=mesh.cp_group)
        values[name] = tensor
    return Batch(**values)
