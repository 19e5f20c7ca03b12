"""The check before every route, and what the server does with its store of keys meanwhile.

Routes under /admin ask for the admin key or a key of scope admin; those that tell of the service
itself are open; all others ask for a key, once there are keys. The store is read and what
was used is written twice a second, away from the event loop: a key that was revoked stops working
within a second. While it cannot be used the keys that were read last stay good, usage is
kept in memory, and the log says so.

Knows: which routes ask for what, the `Authorization` header. Does not know: what routes do.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import Request

from molmo_core.errors import Forbidden, KeyStoreError, NotFound, Unauthorised
from molmo_server.tenancy.callers import Allowance, Caller, Errand, caller_of, set_caller
from molmo_server.tenancy.shared_limits import SharedLimits
from molmo_server.tenancy.store import KeyStore, KeyUsage, Usage, day_of, prefix_of

logger = logging.getLogger(__name__)

_OPEN = ("/health", "/ready", "/metrics", "/docs")
"""Templates of routes; FastAPI's own documents do not pass here."""
_ADMIN = "/admin/"
_BEAT_S = 0.5


class Access:
    def __init__(
        self,
        keys: str | Path | None,
        *,
        admin_key: str | None = None,
        limits: str | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`keys` None: whoever comes is served. `limits`: the URL of a Redis where limits are
        counted together with other servers."""
        self._keys = keys
        self._admin_key = admin_key
        self._now_s = now_s
        self._shared = SharedLimits(limits) if limits else None
        self._store: KeyStore | None = None
        self._allowances: dict[str, Allowance] = {}
        """By prefix; of keys that are not revoked."""
        self._unwritten: dict[tuple[str, str], Usage] = {}
        """By prefix and day."""
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the file as long as the block runs, and leave nothing unwritten.

        Raises KeyStoreError when it cannot be used at the start.
        """
        if self._keys is None:
            yield
            return
        self._store = await asyncio.to_thread(KeyStore, self._keys)
        async with AsyncExitStack() as stack:
            stack.callback(self._store.close)
            if self._shared is not None:
                await stack.enter_async_context(self._shared.running())
            await self._read_keys(self._store)
            ended = asyncio.Event()
            following = asyncio.create_task(self._follow(self._store, ended), name="keys")
            try:
                yield
            finally:
                ended.set()  # not cancelled: a thread may be writing
                await following
                await self._write_usage(self._store)

    async def check(self, request: Request) -> AsyncIterator[None]:
        """Dependency of all routes, before a body is read and until the answer is sent.

        Raises Unauthorised, Forbidden, RateLimited.
        """
        path: str = request.scope["route"].path
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        if path.startswith(_ADMIN):
            self._check_admin(request, given)
            yield
        elif path in _OPEN or self._keys is None:
            yield
        else:
            allowance, caller = self._identify(request, given)
            async with allowance.request(is_background=caller.is_background):
                try:
                    yield
                finally:
                    where = (allowance.key.prefix, day_of(self._now_s()))
                    self._add_usage({where: caller.usage})

    async def usage(self, *, n_days: int) -> list[KeyUsage]:
        """What was used until now. Raises NotFound without keys, KeyStoreError."""
        if self._store is None:
            raise NotFound("usage is counted by key: start the server with MOLMO_KEYS set")
        await self._write_usage(self._store)
        return await asyncio.to_thread(self._store.usage, n_days=n_days, now_s=self._now_s())

    def _check_admin(self, request: Request, given: str) -> None:
        if self._admin_key is None and self._keys is None:
            raise Unauthorised(
                "the routes under /admin are closed: start the server with MOLMO_ADMIN_KEY set, "
                "or with MOLMO_KEYS and a key of scope admin"
            )
        if self._admin_key is not None and hmac.compare_digest(
            given.encode(), self._admin_key.encode()
        ):
            return
        if self._keys is None:
            raise Unauthorised("the admin key is missing or wrong: send Authorization: Bearer KEY")
        allowance, _ = self._identify(request, given)
        if allowance.key.scope != "admin":
            raise Forbidden("this key has the scope infer; send one of scope admin")

    def _identify(self, request: Request, given: str) -> tuple[Allowance, Caller]:
        """Whose key it is, if it is active; the request's log line names the tenant then."""
        if (errand := caller_of(request.scope).errand) is not None:
            allowance = self._allowance_for(errand)
            caller = Caller(allowance=allowance, errand=errand)
            set_caller(request.scope, caller)
            return allowance, caller
        if not given:
            raise Unauthorised(
                "there is no key: send Authorization: Bearer KEY (the molmo command takes it from "
                "MOLMO_API_KEY); whoever runs this server makes one with `molmo keys create`"
            )
        found = self._allowances.get(prefix_of(given))
        is_good = found is not None and found.key.is_of(given)
        if found is None or not is_good or found.key.state(self._now_s()) != "active":
            raise Unauthorised("the key is wrong, revoked or expired; send one that is active")
        caller = Caller(allowance=found)
        set_caller(request.scope, caller)
        return found, caller

    def _allowance_for(self, errand: Errand) -> Allowance:
        """Of the key that asked for it, or when that has ended, of the tenant's other one."""
        of_tenant = [a for a in self._allowances.values() if a.key.name == errand.tenant]
        of_tenant.sort(key=lambda allowance: allowance.key.prefix != errand.key_prefix)
        for allowance in of_tenant:
            if allowance.key.state(self._now_s()) == "active":
                return allowance
        raise Unauthorised(
            "the key that asked for this batch was revoked or has expired, and its name has no "
            "other; send the request again with a key that is active"
        )

    # --- the file -------------------------------------------------------------------------------

    async def _follow(self, store: KeyStore, ended: asyncio.Event) -> None:
        while not ended.is_set():
            try:
                async with asyncio.timeout(_BEAT_S):
                    await ended.wait()
            except TimeoutError:
                await self._read_keys(store)
                await self._write_usage(store)

    async def _read_keys(self, store: KeyStore) -> None:
        """Take over what changed in the file; what a key has left stays with it."""
        try:
            keys = await asyncio.to_thread(store.all_keys)
        except KeyStoreError as error:
            logger.error("keys may be out of date: %s", error.message)
            return
        before = {allowance.key: allowance for allowance in self._allowances.values()}
        self._allowances = {
            key.prefix: before.get(key) or Allowance(key, shared=self._shared)
            for key in keys
            if key.revoked_s is None
        }

    def _add_usage(self, used: Mapping[tuple[str, str], Usage]) -> None:
        for where, more in used.items():
            self._unwritten[where] = self._unwritten.get(where, Usage()) + more

    async def _write_usage(self, store: KeyStore) -> None:
        async with self._writing:  # who waits for it finds all written
            batch, self._unwritten = self._unwritten, {}
            if not batch:
                return
            try:
                await asyncio.to_thread(store.add_usage, batch)
            except KeyStoreError as error:
                logger.error("usage of %d keys is not written yet: %s", len(batch), error.message)
                self._add_usage(batch)
