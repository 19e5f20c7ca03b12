"""Settings that contradict each other, or that are no addresses.

Knows: what goes together, what names and addresses look like. Does not know: defaults and single
ranges (`settings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molmo_server.settings import MolmoSettings

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_ENGINE_URL = re.compile(r"(https?://(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?::([0-9]{1,5}))?)/?")
_LAST_PORT = 65535
_HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9_-]+\.)+[a-z0-9-]+")
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
    yield from _hosts(settings)
    yield from _engines(settings)
    yield from _models(settings)
    if settings.least_same > 0 and settings.shadow_share == 0:
        yield (
            "least_same is about compared answers, and shadow_share is 0: none is compared; set "
            "shadow_share, or leave least_same out"
        )
    if settings.limits is not None and settings.keys is None:
        yield "limits are those of keys, and keys are not asked for; set keys, or leave limits out"
    yield from _addresses(settings)


def _hosts(settings: MolmoSettings) -> Iterator[str]:
    if (settings.remote_media == "allowlist") != bool(settings.remote_hosts):
        yield (
            f"remote_media is {settings.remote_media} and remote_hosts names "
            f"{len(settings.remote_hosts)} hosts; set remote_media to allowlist and name hosts, or "
            "leave remote_hosts out"
        )
    for host in settings.remote_hosts:
        if not _HOST.fullmatch(host):
            yield (
                f"remote_hosts has {host!r}; name hosts as example.org or *.example.org, "
                "without scheme, port and path, in punycode where they are not ASCII"
            )


def _engines(settings: MolmoSettings) -> Iterator[str]:
    if settings.n_own_engines + len(settings.engine_urls) == 0:
        yield "n_engines is 0 and engine_urls is empty; there must be one engine"
    if len(set(settings.engine_urls)) < len(settings.engine_urls):
        yield "engine_urls names an engine twice; leave it out once"
    examined = [
        name for name in ("gate_command", "canary_share", "shadow_share") if getattr(settings, name)
    ]
    if settings.swap_way == "in_place" and examined:
        yield f"{examined[0]} needs a second engine, and swap_way is in_place; leave one out"
    if (settings.swap_way == "blue_green" or examined) and settings.n_own_engines == 0:
        yield (
            "all engines are run by others, as engine_urls says, and a gate, a canary or "
            "swap_way=blue_green need one of this server's own; leave one out"
        )


def _models(settings: MolmoSettings) -> Iterator[str]:
    for name in settings.models:
        if not _MODEL_NAME.fullmatch(name) or name == settings.served_name:
            yield (
                f"models has the name {name[:100]!r}; use up to 32 letters, digits and . _ -, "
                f"and another name than {settings.served_name}"
            )
    places = (settings.store, *settings.models.values())
    stores = [one for one in places if one and not is_checkpoint(one)]
    if len(set(stores)) < len(stores):
        yield "models names a store twice; a store has one current checkpoint"


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


def is_checkpoint(where: str) -> bool:
    """Whether a model's place is a folder with a checkpoint, not a store."""
    return (Path(where) / "config.json").exists()


def checked_engine_url(url: str) -> str:
    """Scheme, host and port of an engine's address. Raises ValueError."""
    found = _ENGINE_URL.fullmatch(url.strip().lower())
    if found is None or int(found[2] or 0) > _LAST_PORT:
        raise ValueError(
            f"got the engine's address {url[:100]!r}; it must be as http://10.0.0.5:8001, without "
            "user name and path"
        )
    return found[1]
