"""Files and batches of one server, put together: their folder is open as long as it runs.

Knows: settings, the order of start and end. Does not know: HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from molmo_core.errors import BatchStoreError
from molmo_server.batches.files import FileStore
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.jobs import JobStore
from molmo_server.batches.runner import Limits, Runner
from molmo_server.settings import MolmoSettings
from molmo_server.telemetry import Metrics


@dataclass(frozen=True, kw_only=True)
class Running:
    folder: BatchFolder
    files: FileStore
    jobs: JobStore
    runner: Runner


class Batches:
    def __init__(self, settings: MolmoSettings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._running: Running | None = None

    @property
    def running(self) -> Running:
        """Raises BatchStoreError before the start and after the end."""
        if self._running is None:
            raise BatchStoreError("files and batches are not open: the server starts or ends")
        return self._running

    @asynccontextmanager
    async def open(self, app: ASGIApp) -> AsyncIterator[None]:
        """Run batches through `app` as long as the block; raises BatchStoreError."""
        settings = self.settings
        folder = await asyncio.to_thread(BatchFolder, settings.batch_dir)
        try:
            self._running = running = self._put_together(folder, app)
            await running.runner.start()
            try:
                yield
            finally:
                await running.runner.stop()
        finally:
            self._running = None
            await asyncio.to_thread(folder.close)

    def _put_together(self, folder: BatchFolder, app: ASGIApp) -> Running:
        settings = self.settings
        files = FileStore(
            folder, quota_bytes=settings.files_quota_bytes, ttl_s=settings.files_ttl_s
        )
        jobs = JobStore(folder, max_unfinished=settings.max_batches, ttl_s=settings.files_ttl_s)
        runner = Runner(
            app,
            folder=folder,
            files=files,
            jobs=jobs,
            limits=Limits(
                n_concurrent=settings.batch_concurrent,
                max_line_bytes=settings.max_body_bytes,
                max_lines=settings.max_batch_lines,
            ),
            on_line=self._note_line,
        )
        self._metrics.batches.set_function(lambda: runner.n_unfinished)
        return Running(folder=folder, files=files, jobs=jobs, runner=runner)

    def _note_line(self, is_good: bool) -> None:
        self._metrics.batch_lines.labels("completed" if is_good else "failed").inc()
