"""Which URLs may be fetched, and which addresses are the public's.

A URL is parsed once, by yarl, and the parsed URL is what is fetched: there is no second parser
that could read it otherwise. Host names are ASCII by then (IDNA), so what looks like `localhost`
or `127.0.0.1` is that, and what is a number in any other spelling than the plain one is refused.

Knows: URLs, address blocks. Does not know: names' addresses, connections (`remote`).
Source: IANA's registries of special-purpose addresses; the lists of Python 3.11's `ipaddress` have
gaps (CVE-2024-4032), hence the ones here. WHATWG URL, "ends in a number".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from yarl import URL

from molmo_core.errors import InvalidMedia
from molmo_server.settings import MolmoSettings

_MAX_URL_CHARS = 2048
_MAX_HOST_CHARS = 253
_PORTS = (80, 443)
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)+[a-z0-9-]{1,63}")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_SHOWN_CHARS = 60

_NOT_PUBLIC = tuple(
    map(
        IPv4Network,
        (
            "192.0.0.0/24",  # protocol assignments
            "192.88.99.0/24",  # 6to4 relays
            "168.63.129.16/32",  # Azure's metadata for its own machines
        ),
    )
)
_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


def parse(text: str, what: str, settings: MolmoSettings, *, base: URL | None = None) -> URL:
    """The URL to fetch, without fragment; `base` is the one that redirected to it.

    Raises InvalidMedia, with `what` as the name of the medium.
    """
    if len(text) > _MAX_URL_CHARS:
        raise _refused(what, f"a URL of {len(text):,} characters, allowed are {_MAX_URL_CHARS:,}")
    if "\\" in text or any(not c.isprintable() or c.isspace() for c in text):
        raise _refused(what, "a URL with a backslash, a space or a control character")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        host, port = url.raw_host or "", url.port
    except (ValueError, UnicodeError) as error:
        raise _refused(what, "a URL that cannot be read") from error
    schemes = ("https", "http") if settings.remote_allow_http else ("https",)
    if url.scheme not in schemes:
        raise _refused(what, f"{url.scheme[:20]!r} as URL scheme, allowed: {', '.join(schemes)}")
    if url.raw_user is not None or url.raw_password is not None:
        raise _refused(what, "a URL with a user name or a password")
    if port not in _PORTS:
        raise _refused(what, f"port {port} in its URL, allowed are 80 and 443")
    if literal(host) is None and not _is_name(host):
        raise _refused(what, f"a URL whose host {host[:_SHOWN_CHARS]!r} is no public name")
    if settings.remote_media == "allowlist" and not _is_listed(host, settings.remote_hosts):
        raise _refused(what, f"a URL of {host[:_SHOWN_CHARS]!r}, which this server does not fetch")
    return url.with_fragment(None)


def literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether anybody's packets may reach it; an address inside another must be so as well."""
    if isinstance(address, IPv4Address):
        is_special = any(address in network for network in _NOT_PUBLIC)
        return address.is_global and not address.is_multicast and not is_special
    if address.scope_id is not None:
        return False
    carried = _carried(address)
    if not all(map(is_public, carried)):
        return False
    if address.ipv4_mapped is not None or address in _NAT64:
        return True
    if address.sixtofour is not None or address.teredo is not None:
        return True
    return address in _UNICAST and not any(address in network for network in _NOT_PUBLIC_V6)


def _carried(address: IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses that packets to this one may come out at."""
    carried = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    number = int(address)
    last = IPv4Address(number & 0xFFFFFFFF)
    if address in _NAT64 or (number >> 32) & 0xFFFFFFFF in _ISATAP:
        carried.append(last)
    return [inner for inner in carried if inner is not None]


def _is_name(host: str) -> bool:
    """A name with a dot in it and none at its end, that no resolver reads as a number."""
    is_spelled = len(host) <= _MAX_HOST_CHARS and _NAME.fullmatch(host) is not None
    return is_spelled and _NUMBER.fullmatch(host.rpartition(".")[2]) is None


def _is_listed(host: str, patterns: Sequence[str]) -> bool:
    return any(
        host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


def _refused(what: str, got: str) -> InvalidMedia:
    return InvalidMedia(
        f"{what} has {got}; send an https URL of a public server, an uploaded file "
        "(`media://media-…`) or a data URL"
    )
