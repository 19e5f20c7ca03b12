"""Settings that contradict each other, or that are no addresses.

Knows: what goes together. Does not know: defaults and single ranges (`settings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molmo_server.settings import MolmoSettings

_ORIGIN = re.compile(r"https?://[^/@?#\s]+")
_SCHEMES = {
    "otlp_endpoint": ("http://", "https://"),
    "limits": ("redis://", "rediss://", "unix://"),
}


def contradictions(settings: MolmoSettings) -> Iterator[str]:
    """What is wrong, as sentences."""
    for low, high in (
        ("default_max_tokens", "max_tokens_limit"),
        ("first_backoff_s", "longest_backoff_s"),
    ):
        if getattr(settings, low) > getattr(settings, high):
            yield (
                f"{low} is {getattr(settings, low):g}, more than {high}, which is "
                f"{getattr(settings, high):g}; lower the one or raise the other"
            )
    needs_own = (
        settings.swap_way == "blue_green"
        or settings.gate_command
        or settings.canary_share
        or settings.shadow_share
    )
    if needs_own and settings.n_own_engines == 0:
        yield (
            "all engines are run by others, as engine_urls says, and a gate, a canary or "
            "swap_way=blue_green need one of this server's own; leave one out"
        )
    if settings.least_same > 0 and settings.shadow_share == 0:
        yield (
            "least_same is about compared answers, and shadow_share is 0: none is compared; set "
            "shadow_share, or leave least_same out"
        )
    if settings.limits is not None and settings.keys is None:
        yield "limits are those of keys, and keys are not asked for; set keys, or leave limits out"
    yield from _addresses(settings)


def _addresses(settings: MolmoSettings) -> Iterator[str]:
    for name, allowed in _SCHEMES.items():
        value = getattr(settings, name)
        if value is not None and not value.startswith(allowed):
            yield f"{name} begins otherwise than {' or '.join(allowed)}; write a URL"
    for origin in settings.cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            yield (
                f"cors_origins has {origin!r}; write https://app.example.org, without a path, or * "
                "for all"
            )
