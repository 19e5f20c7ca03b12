"""Where the server is and how patiently it is asked.

Knows: addresses, keys, time limits, and the environment variables of the client: `MOLMO_SERVER`
and `MOLMO_API_KEY`, read here and nowhere else. Does not know: verbs. Source: this project's own.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

import molmo_core
from molmo_client.failures import AnswerTimedOut, ServerUnreachable, WrongUsage
from molmo_client.retries import RetryPolicy
from molmo_core.errors import MolmoError

DEFAULT_SERVER = "http://127.0.0.1:8000"
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """`answer_timeout_s` bounds the silence before an answer, and the time until all of it came;
    of one that is read as it comes, the silence between two bytes."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 5.0
    answer_timeout_s: float = 600.0
    retries: RetryPolicy = field(default_factory=RetryPolicy)

    def httpx_options(self) -> dict[str, Any]:
        """Keyword arguments for `httpx2.Client` and `httpx2.AsyncClient`."""
        headers = {"user-agent": f"molmo-client/{molmo_core.__version__}"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        return {
            "base_url": self.url,
            "headers": headers,
            "timeout": httpx2.Timeout(self.answer_timeout_s, connect=self.connect_timeout_s),
            "limits": httpx2.Limits(max_connections=1000, max_keepalive_connections=100),
            # A proxy of the environment cannot reach this machine's own loopback.
            "trust_env": urlsplit(self.url).hostname not in _LOOPBACK_HOSTS,
        }

    def failure(self, failure: httpx2.TransportError) -> MolmoError:
        """What a caller is told when the last try ended in `failure`."""
        if isinstance(failure, httpx2.ReadTimeout | httpx2.WriteTimeout):
            return AnswerTimedOut(
                f"{self.url} did not answer within {self.answer_timeout_s:g} s; "
                "ask for less, or allow more with answer_timeout_s"
            )
        reason = str(failure) or type(failure).__name__
        return ServerUnreachable(
            f"cannot reach a server at {self.url} ({reason}); start it with `molmo serve`, "
            "or name another with --server or MOLMO_SERVER"
        )


class Arriving:
    """The body of an answer, piece by piece, in time however slowly the pieces drip."""

    def __init__(self, response: httpx2.Response, *, limit_s: float) -> None:
        self._response = response
        self._pieces: list[bytes] = []
        self._end_s = time.monotonic() + limit_s

    def add(self, piece: bytes) -> None:
        """Raises httpx2.ReadTimeout."""
        if time.monotonic() > self._end_s:
            raise httpx2.ReadTimeout("the answer drips", request=self._response.request)
        self._pieces.append(piece)

    def whole(self) -> httpx2.Response:
        """The same answer with its body, as it is after decompression."""
        headers = self._response.headers.copy()
        headers.pop("content-encoding", None)
        return httpx2.Response(
            self._response.status_code,
            headers=headers,
            content=b"".join(self._pieces),
            request=self._response.request,
        )


def connection_to(
    url: str | None = None,
    *,
    api_key: str | None = None,
    answer_timeout_s: float = 600.0,
    retries: RetryPolicy | None = None,
) -> Connection:
    """A connection to `url`, else to `MOLMO_SERVER`, else to this machine's port 8000.

    Raises WrongUsage for an address that is not http(s).
    """
    named = url or os.environ.get("MOLMO_SERVER") or DEFAULT_SERVER
    address = named.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(address)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_usable = False
    if not is_usable:
        raise WrongUsage(f"server address is {named!r}; write it as http://HOST:PORT")
    return Connection(
        url=address,
        api_key=api_key or os.environ.get("MOLMO_API_KEY") or None,
        answer_timeout_s=answer_timeout_s,
        retries=retries or RetryPolicy(),
    )
