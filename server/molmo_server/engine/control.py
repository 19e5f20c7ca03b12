"""The control routes of our engine processes: other weights under a running server.

vLLM attaches this plugin (`vllm.endpoint_plugins: molmo_control`) to the API server of an engine.
The engine listens on a Unix socket that only the gateway opens, so the routes ask for no key.

    GET  /molmo/weights                              what is loaded, and what requests may ask
    POST /molmo/weights {"folder": …, "version": …}  load those

Knows: vLLM's calls for pausing, reloading and resetting caches, and their order. Does not know:
whether the weights are any good (the gateway checks before and after), who waits meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import State

from molmo_core.errors import CheckpointError
from molmo_server.checkpoints.folder import weight_differences

logger = logging.getLogger(__name__)

_RESTORED, _LOST = 409, 500


class WeightsRequest(BaseModel):
    folder: str
    version: str


class SwapFailed(Exception):
    """Loading failed; `is_restored` tells whether the engine serves its old weights again."""

    def __init__(self, message: str, *, is_restored: bool) -> None:
        super().__init__(message)
        self.is_restored = is_restored


class WeightSwapper:
    """Loads weights into the engine behind `client`, one folder at a time."""

    def __init__(self, client: Any, answering: Any, folder: str, version: str) -> None:
        self._client, self._answering = client, answering
        self._lock = asyncio.Lock()
        self.folder, self.version = folder, version

    async def swap(self, folder: str, version: str) -> dict[str, float]:
        """Load `folder`; returns the seconds of each phase. Raises SwapFailed.

        Requests in flight end on the weights they began with; what comes meanwhile waits inside
        the engine. After a failure nothing is resumed before the old weights are back: the model
        may be half loaded.
        """
        async with self._lock:
            await self._check(folder)
            clock = _Clock()
            await self._client.pause_generation(mode="wait", clear_cache=False)
            clock.note("pause")
            if failure := await self._failure_of_loading(folder):
                await self._restore(folder, failure)
            clock.note("load")
            self._name(folder, version)
            await self._client.update_weight_version(version)
            await self._client.resume_generation()
            clock.note("resume")
            return clock.seconds

    async def _check(self, folder: str) -> None:
        """vLLM would keep the old tensor where one is missing, and break on another shape."""
        try:
            wrong = await asyncio.to_thread(weight_differences, Path(self.folder), Path(folder))
        except CheckpointError as error:
            wrong = [error.message]
        if wrong:
            raise SwapFailed(f"nothing was loaded: {'; '.join(wrong)}", is_restored=True)

    async def _load(self, folder: str) -> None:
        await self._client.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        # What was computed with the old weights: keys and values, features of pictures. The
        # cache of preprocessed pixels stays, it does not depend on weights.
        if not await self._client.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache could not be reset")
        await self._client.reset_encoder_cache()

    async def _failure_of_loading(self, folder: str) -> BaseException | None:
        """vLLM passes on what a worker raised as a bare Exception."""
        (outcome,) = await asyncio.gather(self._load(folder), return_exceptions=True)
        return outcome

    async def _restore(self, folder: str, error: BaseException) -> None:
        """Back to the old weights; raises SwapFailed in either case."""
        logger.error("loading %s failed: %s", folder, error)
        if worse := await self._failure_of_loading(self.folder):
            raise SwapFailed(
                f"loading failed ({_short(error)}), and so did loading the old weights again "
                f"({_short(worse)})",
                is_restored=False,
            ) from worse
        await self._client.resume_generation()
        raise SwapFailed(f"loading failed: {_short(error)}", is_restored=True) from error

    def _name(self, folder: str, version: str) -> None:
        self.folder, self.version = folder, version
        self._answering.system_fingerprint = version  # stands in every answer and chunk


class ControlPlugin:
    """What vLLM's plugin loader makes and calls."""

    name = "molmo_control"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(control_router())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        answering = state.openai_serving_chat
        version = answering.system_fingerprint or ""
        state.molmo_takes_media_options = bool(args.trust_request_mm_kwargs)
        state.molmo_weights = WeightSwapper(engine_client, answering, args.model, version)


def control_router() -> APIRouter:
    router = APIRouter()

    @router.get("/molmo/weights")
    async def loaded(request: Request) -> dict[str, Any]:
        state = request.app.state
        swapper: WeightSwapper = state.molmo_weights
        return {
            "folder": swapper.folder,
            "version": swapper.version,
            "takes_media_options": state.molmo_takes_media_options,
        }

    @router.post("/molmo/weights")
    async def load(wanted: WeightsRequest, request: Request) -> JSONResponse:
        swapper: WeightSwapper = request.app.state.molmo_weights
        try:
            # Shielded: a gateway that goes away must not leave a model half loaded.
            seconds = await asyncio.shield(swapper.swap(wanted.folder, wanted.version))
        except SwapFailed as failed:
            status = _RESTORED if failed.is_restored else _LOST
            return JSONResponse({"error": {"message": str(failed)}}, status_code=status)
        return JSONResponse({"version": swapper.version, "seconds": seconds})

    return router


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def note(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 4)
        self._last = now


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
