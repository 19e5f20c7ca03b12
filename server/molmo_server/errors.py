"""Every failure becomes OpenAI's error envelope, at the edge of the service.

Knows: how pydantic, Starlette and `molmo_core.errors` say what is wrong. Does not know: why.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from molmo_core.errors import InvalidRequest, MolmoError, NotFound, UnknownField

Model = TypeVar("Model", bound=BaseModel)
_ERROR_CODE = "error_code"


def parse_json(body: bytes, model: type[Model]) -> Model:
    """Read a request body; raises InvalidRequest, UnknownField."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON ({error}); send a JSON object with content-type application/json"
        ) from error
    return parse_fields(data, model, is_strict=True)


def parse_fields(data: Any, model: type[Model], *, is_strict: bool) -> Model:
    """Check fields; `is_strict` False reads numbers from text, as forms send them."""
    try:
        return model.model_validate(data, strict=None if is_strict else False)
    except ValidationError as error:
        raise from_validation(error) from error


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first complaint; values are not repeated, they may be whole pictures."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "unknown_field":
        return UnknownField(first["msg"], param=".".join([*location, first["ctx"]["name"]]))
    path = ".".join(location) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "this field is missing; add it"
    return InvalidRequest(f"{path}: {message}" if path else message, param=path)


def refusal(status: int, message: str) -> InvalidRequest:
    """An InvalidRequest with another status than 400."""
    error = InvalidRequest(message)
    error.status = status
    return error


def note_error(scope: Scope, error: MolmoError) -> None:
    """Have a request counted under the code of what ended it."""
    scope["state"][_ERROR_CODE] = error.code


def error_code_of(scope: Scope) -> str:
    """What `note_error` was told; empty when nothing went wrong."""
    code: str = scope["state"].get(_ERROR_CODE, "")
    return code


def error_body(error: MolmoError) -> bytes:
    return orjson.dumps(error.envelope())


def error_response(error: MolmoError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_body(error), error.status, headers=headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(MolmoError)
    async def known(request: Request, error: MolmoError) -> Response:
        note_error(request.scope, error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def of_a_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        invalid = InvalidRequest(f"{name}: {first['msg']}", param=name)
        note_error(request.scope, invalid)
        return error_response(invalid)

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            mapped: MolmoError = NotFound(f"there is no {request.url.path}; see /docs")
        else:
            mapped = refusal(error.status_code, f"{error.detail}; see /docs")
        note_error(request.scope, mapped)
        response = error_response(mapped)
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the framework names those of one of the path's routes
            response.headers["allow"] = ", ".join(_methods_of(request))
        return response


def _methods_of(request: Request) -> list[str]:
    """What the path of a request can be asked with."""
    matching = [
        route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE
    ]
    return sorted({m for route in matching for m in getattr(route, "methods", None) or ()})
