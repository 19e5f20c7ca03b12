"""The engines of this service, as its settings ask for them.

Knows: how settings and a checkpoint become a process and an engine. Does not know: command lines
(`engine.launch`), processes (`engine_pool.supervisor`), which checkpoint is to be served.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import orjson
from PIL import Image

from molmo_core.checkpoints import MANIFEST, read_manifest
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.engine.launch import EngineSettings, engine_command
from molmo_server.engine_pool import (
    EngineAddress,
    EnginePool,
    EngineProcess,
    EngineTiming,
    RemoteEngine,
    RestartPolicy,
    SupervisedEngine,
)
from molmo_server.engine_pool.probing import ProbeLimits, wrong_probes
from molmo_server.settings import MolmoSettings


def build_pool(settings: MolmoSettings, checkpoint: Checkpoint, own: OwnEngines) -> EnginePool:
    """Processes of our own, and the engines at the URLs of the settings."""
    return EnginePool(
        [
            *(own.numbered(checkpoint, number) for number in range(settings.n_own_engines)),
            *(remote_engine(settings, url) for url in settings.engine_urls),
        ]
    )


def remote_engine(settings: MolmoSettings, url: str) -> RemoteEngine:
    """An engine that others run; its name is where it is, the same for every gateway."""
    return RemoteEngine(
        name=url.partition("://")[2],
        address=EngineAddress(url=url),
        timing=_timing(settings),
        warm_ups=_warm_ups(settings.served_name),
    )


@dataclass(frozen=True, kw_only=True)
class OwnEngines:
    """Makes engines whose processes are ours; each has a socket and a log of its name."""

    settings: MolmoSettings
    socket_dir: Path
    """Short and private: a socket's path may have 107 characters."""
    log_dir: Path
    prefix: str = "engine"
    """Of names; another one for each model."""

    @cached_property
    def media_folder(self) -> Path:
        """Where engines find the files that requests name."""
        folder = self.socket_dir / "media"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def numbered(self, checkpoint: Checkpoint, number: int) -> SupervisedEngine:
        """One of those that the settings ask for, not yet started."""
        all_devices = self.settings.engine_devices
        devices = all_devices[number % len(all_devices)] if all_devices else ""
        return self._engine(checkpoint, self.name(number), devices, self._restarts)

    def on_trial(
        self, checkpoint: Checkpoint, name: str, replaced: SupervisedEngine
    ) -> SupervisedEngine:
        """One that may take another one's place, not yet started; it has one try to start."""
        restarts = replace(self._restarts, max_failed_starts=1)
        return self._engine(checkpoint, name, replaced.devices, restarts)

    @property
    def _restarts(self) -> RestartPolicy:
        return RestartPolicy(
            first_backoff_s=self.settings.first_backoff_s,
            longest_backoff_s=self.settings.longest_backoff_s,
            max_failed_starts=self.settings.max_failed_starts,
        )

    def _engine(
        self, checkpoint: Checkpoint, name: str, devices: str, restarts: RestartPolicy
    ) -> SupervisedEngine:
        engine = SupervisedEngine(
            name=name,
            process=self.process(checkpoint, name),
            timing=_timing(self.settings),
            restarts=restarts,
            warm_ups=_warm_ups(self.settings.served_name),
            devices=devices,
        )
        engine.checkpoint_id = checkpoint.id
        engine.media_folder = self.media_folder
        return engine

    def process(self, checkpoint: Checkpoint, name: str) -> EngineProcess:
        """How the engine of that name is started on a checkpoint."""
        settings, socket = self.settings, self.socket_dir / f"{name}.sock"
        argv, environment = engine_command(
            EngineSettings(
                checkpoint=checkpoint.folder,
                socket=socket,
                served_name=settings.served_name,
                dtype=settings.dtype,
                max_model_len=checkpoint.max_model_len,
                max_num_seqs=settings.max_concurrent + 1,  # one for the question whether it hangs
                max_images=settings.max_images,
                kv_cache_gib=settings.kv_cache_gib,
                is_eager=settings.is_eager,
                drafts=settings.drafts,
                n_threads=settings.engine_threads,
                frame_cache_gib=settings.frame_cache_gib,
                media_folder=self.media_folder,
                otlp_endpoint=settings.otlp_endpoint,
                # The engine's own words then name the checkpoint, also inside streams.
                extra_arguments=(
                    *("--fingerprint-mode", "custom"),
                    *("--fingerprint-value", checkpoint.id),
                ),
            )
        )
        return EngineProcess(
            argv=argv,
            environment=environment,
            socket=socket,
            log=self.log_dir / f"{name}.log",
            examine=self.examination(checkpoint),
        )

    def examination(
        self, checkpoint: Checkpoint
    ) -> Callable[[RemoteEngine], Awaitable[list[str]]] | None:
        """Of what was published an engine must answer the probes, at every start of it."""
        if not (checkpoint.folder / MANIFEST).exists():
            return None
        return partial(
            wrong_probes,
            probes=read_manifest(checkpoint.folder).probes,
            model=self.settings.served_name,
            limits=ProbeLimits(tolerance=self.settings.probe_tolerance),
        )


def _timing(settings: MolmoSettings) -> EngineTiming:
    return EngineTiming(
        health_interval_s=settings.health_interval_s,
        health_timeout_s=settings.health_timeout_s,
        hang_grace_s=settings.hang_grace_s,
        start_timeout_s=settings.start_timeout_s,
    )


def _warm_ups(served_name: str) -> tuple[bytes, ...]:
    """A text and a picture: what is loaded on first use is loaded before anyone waits for it."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    text = {"type": "text", "text": "Hi"}
    image = {"type": "image_url", "image_url": {"url": url}}
    return tuple(
        orjson.dumps(
            {
                "model": served_name,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 1,
            }
        )
        for content in ([text], [image, text])
    )
