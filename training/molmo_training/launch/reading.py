"""The batches of a rank: read by one of those that share them, handed to the others.

Knows: the mesh, the stream. Does not know: what is done with batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from molmo_core.errors import DataError
from molmo_training.data.example import Batch
from molmo_training.data.stream import PackedStream
from molmo_training.launch.plan import Plan
from molmo_training.parallel.mesh import Mesh


class SharedStream:
    """`PackedStream` of this rank's group: its first rank reads, whatever that meets all meet."""

    def __init__(self, plan: Plan, mesh: Mesh, state: Mapping[str, Any] | None) -> None:
        data = plan.config.data
        self._mesh = mesh
        self._stream = PackedStream(
            plan.stream_config,
            plan.sources,
            rank=mesh.dp_rank,
            world_size=mesh.dp_size,
            n_workers=data.n_workers,
            n_prefetched=data.n_prefetched,
            state=state,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError on all ranks of the group."""
        if self._mesh.cp_size == 1:
            yield from self._stream
            return
        source = iter(self._stream) if self._reads else None
        first = dist.get_rank() - self._mesh.cp_rank
        while True:
            met: list[Any] = [None]
            if source is not None:
                try:
                    met = [next(source)]
                except DataError as error:
                    met = [error]
            dist.broadcast_object_list(met, src=first, group=self._mesh.cp_group)
            if isinstance(met[0], DataError):
                raise met[0]
            yield met[0]

    @property
    def _reads(self) -> bool:
        return self._mesh.cp_rank == 0

    def state(self) -> dict[str, Any]:
        """Where the group stands, told by its first rank alone."""
        if self._reads:
            return self._stream.state()
        return {**self._stream.plan.identity, "lanes": {}}
