"""Files of other servers, when the settings allow it.

What is fetched could be chosen to reach into the network that the server stands in. So each hop of
each request: the URL is checked (`public_url`), its name is looked up once, every address found
must be public, and the connection goes to those addresses and nowhere else, under the name that was
asked for (Host, TLS). Redirects are followed here, hop by hop. Nothing of ours is sent along: no
cookies, no credentials, no proxy of the environment. A body is counted while it arrives, and never
unpacked. Errors tell neither what a server wrote nor what addresses a name has.

Knows: HTTP, names' addresses. Does not know: what the bytes are (`look`).
Source: threat table of the security specification.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from molmo_core.errors import InvalidMedia
from molmo_server.media.look import check_length
from molmo_server.media.public_url import is_public, literal, parse
from molmo_server.settings import MolmoSettings

LookUp = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) → its addresses; raises OSError when there are none."""

_REDIRECTS = frozenset([301, 302, 303, 307, 308])
_HEADERS = {"accept": "image/*, video/*", "accept-encoding": "identity", "user-agent": "molmo"}
_OTHERWISE = "upload the file (POST /v1/media) or send it as a data URL"


async def system_look_up(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Pinned(AbstractResolver):
    """Answers with addresses that were found and checked before."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


class RemoteMedia:
    """Fetches files; `look_up` and `pinned` are there for tests, where loopback is the world."""

    def __init__(
        self,
        settings: MolmoSettings,
        *,
        look_up: LookUp = system_look_up,
        pinned: Callable[[Sequence[str]], AbstractResolver] = Pinned,
    ) -> None:
        self._settings = settings
        self._look_up = look_up
        self._pinned = pinned

    async def fetch(self, text: str, what: str, limit_bytes: int) -> bytes:
        """The file at a URL; `what` names it in messages. Raises InvalidMedia."""
        self._check_taken(text, what)
        limit_s = self._settings.remote_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._follow(text, what, limit_bytes)
        except TimeoutError as error:
            raise InvalidMedia(
                f"{what} did not arrive within {limit_s:g} s; {_OTHERWISE}"
            ) from error

    def _check_taken(self, text: str, what: str) -> None:
        scheme, colon, _ = text.partition(":")
        if scheme.lower() not in ("http", "https"):
            why = f"only data URLs, uploads (`media://…`) and https URLs are taken; {_OTHERWISE}"
        elif self._settings.remote_media == "off":
            why = f"only data URLs and uploads (`media://…`) are taken here; {_OTHERWISE}"
        else:
            return
        shown = scheme[:20] if colon else "no"
        raise InvalidMedia(f"{what} has {shown!r} as URL scheme, {why}")

    async def _follow(self, text: str, what: str, limit_bytes: int) -> bytes:
        url = parse(text, what, self._settings)
        for _ in range(self._settings.remote_max_redirects + 1):
            async with self._open(url, what) as response:
                if response.status not in _REDIRECTS:
                    return await _body(response, what, limit_bytes)
                location = response.headers.get("location", "")
            url = parse(location, what, self._settings, base=url)
        raise InvalidMedia(
            f"{what} is redirected more than {self._settings.remote_max_redirects} times; "
            "send the last URL"
        )

    @asynccontextmanager
    async def _open(self, url: URL, what: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, with a connection and a session of its own: no cookie outlives it."""
        addresses = await self._addresses(url, what)
        connector = aiohttp.TCPConnector(
            resolver=self._pinned(addresses), use_dns_cache=False, force_close=True
        )
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    headers=_HEADERS,
                    timeout=aiohttp.ClientTimeout(total=None),  # `fetch` has one for all hops
                    auto_decompress=False,
                    trust_env=False,
                ) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                yield response
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise InvalidMedia(
                f"{what} could not be fetched from {url.raw_host}; check the URL, or {_OTHERWISE}"
            ) from error

    async def _addresses(self, url: URL, what: str) -> list[str]:
        """Where the URL's host is: all of it public, or nothing."""
        host = url.raw_host or ""
        if literal(host) is not None:
            found = [host]
        else:
            try:
                found = await self._look_up(host, url.port or 0)
            except OSError:
                found = []
        if not found or not all(is_public(ip_address(address)) for address in found):
            # One text for both: whether an inner name exists is not told.
            raise InvalidMedia(f"{what}: {host[:60]!r} has no public address; {_OTHERWISE}")
        return found


async def _body(response: aiohttp.ClientResponse, what: str, limit_bytes: int) -> bytes:
    if response.status != 200:
        raise InvalidMedia(
            f"{what}: {response.url.raw_host} answered with status {response.status}; "
            f"check the URL, or {_OTHERWISE}"
        )
    body = bytearray()
    check_length(response.content_length or 0, what, limit_bytes)
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit_bytes:
            raise InvalidMedia(
                f"{what} has more than {limit_bytes:,} bytes, which is what is allowed; "
                "send a smaller file"
            )
    return bytes(body)
