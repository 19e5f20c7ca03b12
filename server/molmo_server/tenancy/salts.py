"""A secret value for each tenant, which keeps their caches apart.

Who shares a cache with others learns from the time an answer takes whether somebody has asked the
same before. Knows: how values are made. Does not know: caches.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


class TenantSalts:
    """The secret is made anew with each server: nothing that it salts outlives the server."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret or secrets.token_bytes(32)

    def of(self, tenant: str) -> str:
        """Empty where no keys are asked for: all callers are one."""
        if not tenant:
            return ""
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()[:32]
