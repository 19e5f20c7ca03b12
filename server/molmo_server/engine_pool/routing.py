"""Which of several engines is asked: the one that knows the medium, unless it has too much to do.

Every medium has its own order of the engines, by a hash of both (rendezvous hashing): questions
about one medium meet in one engine, whose caches then hold it; when an engine leaves, only its own
media change place, and every gateway with the same engines finds the same order. The first in the
order that has not much more to do than the others is asked (hashing with bounded loads). A question
without media goes to whoever has least to do.

Knows: names and loads of engines. Does not know: requests, readiness.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

_BOUND = 1.5
"""An engine may have so many times the mean of requests in flight; above it the next is asked."""


class Routable(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def n_in_flight(self) -> int: ...
    @property
    def is_avoided(self) -> bool:
        """Asked only when no other can be."""


Engine = TypeVar("Engine", bound=Routable)


def choose(engines: Sequence[Engine], key: str) -> Engine:
    """One of the engines, of which there must be one; `key` names the medium, "" means none."""
    willing = [engine for engine in engines if not engine.is_avoided] or engines
    if key:
        n_after = 1 + sum(engine.n_in_flight for engine in willing)
        most = math.ceil(_BOUND * n_after / len(willing))
        for engine in ranked(willing, key):
            if engine.n_in_flight < most:
                return engine
    return min(willing, key=lambda engine: engine.n_in_flight)


def ranked(engines: Sequence[Engine], key: str) -> list[Engine]:
    """All engines, the one that this medium belongs to first."""
    return sorted(engines, key=lambda engine: _weight(engine.name, key))


def _weight(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\n{key}".encode(), digest_size=8).digest()
