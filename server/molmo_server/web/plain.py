"""Routes that read their request by themselves: FastAPI describes them, and does nothing else.

FastAPI solves dependencies, validates and serialises anew for each request; a route that takes no
more than a `Request` and answers with a `Response` of its own has none of that to do (it took
about 0.06 ms a request).

Knows: FastAPI's routes, dependencies that want a `Request`. Does not know: what is asked.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send


class PlainRoute(APIRoute):
    """For `APIRouter(route_class=…)`.

    The endpoint is a coroutine function from `Request` to `Response`; dependencies of the
    application and the router are async generator functions of a `Request`, which end when the
    answer is sent.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._checks = [
            asynccontextmanager(one.dependency)
            for one in self.dependencies
            if one.dependency is not None
        ]
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        async with AsyncExitStack() as stack:
            for check in self._checks:
                await stack.enter_async_context(check(request))
            response = await self.endpoint(request)
            await response(scope, receive, send)
