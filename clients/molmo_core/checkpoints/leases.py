"""Who serves which checkpoints, for the next ten minutes.

Knows: the content of a lease. Does not know: where it is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection

from molmo_core.errors import CheckpointError

_LEASE_S = 600.0


def new_lease(checkpoint_ids: Collection[str]) -> bytes:
    lease = {"ids": sorted(checkpoint_ids), "until": time.time() + _LEASE_S}
    return json.dumps(lease).encode()


def held_by(content: bytes, name: str) -> set[str]:
    """The ids that a lease holds now. Raises CheckpointError for a damaged one."""
    try:
        lease = json.loads(content)
        return set(lease["ids"]) if lease["until"] > time.time() else set()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the lease {name} cannot be read ({error!r}); remove it when nothing of that name is "
            "running"
        ) from error
