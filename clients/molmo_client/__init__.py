"""Ask a Molmo server from Python: `Client` and `AsyncClient`, typed, and drawing.

Knows: HTTP towards the gateway, files on this machine. Does not know: models, engines; it never
imports torch. The `molmo` command is `molmo_client.__main__`.
"""

from molmo_client.client import AsyncClient, Client
from molmo_client.failures import AnswerTimedOut, RequestFailed, ServerUnreachable, WrongUsage
from molmo_client.media import EncodedMedia, MediaInput, OneMedia, encode
from molmo_client.retries import RetryPolicy

__all__ = [
    "AnswerTimedOut",
    "AsyncClient",
    "Client",
    "EncodedMedia",
    "MediaInput",
    "OneMedia",
    "RequestFailed",
    "RetryPolicy",
    "ServerUnreachable",
    "WrongUsage",
    "encode",
]
