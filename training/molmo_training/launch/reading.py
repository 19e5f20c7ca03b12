"""The batches of a rank: read by one of those that share them, handed to the others.

Knows: the mesh, the stream. Does not know: what is done with batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from molmo_training.data.example import Batch
from molmo_training.data.stream import PackedStream
from molmo_training.launch.plan import Plan
from molmo_training.parallel.mesh import Mesh
from molmo_training.parallel.shared_batches import shared_batches


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
        return shared_batches(self._stream if self._reads else None, self._mesh)

    @property
    def _reads(self) -> bool:
        return self._mesh.cp_rank == 0

    def state(self) -> dict[str, Any]:
        """Where the group stands, told by its first rank alone."""
        if self._reads:
            return self._stream.state()
        return {**self._stream.plan.identity, "lanes": {}}
