"""Many processes as one: who has what (`mesh`), weights split, a sequence split.

Gradients are sums over all ranks, whichever way: each rank goes backward from the part of the
step's loss that it has, divided by the weights of the whole step, and nothing else is scaled.
"""

from molmo_training.parallel.mesh import ALONE, Mesh, ParallelConfig, make_mesh
from molmo_training.parallel.sharding import shard_model, split_again
from molmo_training.parallel.shared_batches import shared_batches

__all__ = [
    "ALONE",
    "Mesh",
    "ParallelConfig",
    "make_mesh",
    "shard_model",
    "shared_batches",
    "split_again",
]
