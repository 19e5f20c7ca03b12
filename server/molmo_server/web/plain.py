"""Routes that read their request by themselves: FastAPI describes them, and does nothing else.

FastAPI solves dependencies, validates and serialises anew for each request; a route that takes no
more than a `Request` and answers with a `Response` of its own has none of that to do (it took
about 0.06 ms a request).

Knows: FastAPI's routes, dependencies that want a `Request`. Does not know: what is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

Answer = Callable[[Request, Receive, Send], Awaitable[None]]


class PlainRoute(APIRoute):
    """For `APIRouter(route_class=…)`.

    The endpoint is a coroutine function from `Request` to `Response`; dependencies of the
    application and the router are async generator functions of a `Request`, which end when the
    answer is sent.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        answer: Answer = self._answer
        for one in reversed(self.dependencies):
            if one.dependency is not None:
                answer = _checked(asynccontextmanager(one.dependency), answer)
        self._checked_answer = answer
        self.app = self._take

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._checked_answer(Request(scope, receive, send), receive, send)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        response = await self.endpoint(request)
        await response(request.scope, receive, send)


def _checked(
    check: Callable[[Request], AbstractAsyncContextManager[None]], answer: Answer
) -> Answer:
    async def answer_checked(request: Request, receive: Receive, send: Send) -> None:
        async with check(request):
            await answer(request, receive, send)

    return answer_checked
