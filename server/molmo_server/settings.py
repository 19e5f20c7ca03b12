"""Settings of the service; the one place of this package that reads the environment.

Every field can be set as `MOLMO_<FIELD>` (`MOLMO_PORT=9000`); command line options of
`molmo serve` win over the environment. Sizes are bytes unless the name says otherwise.

Knows: names, defaults, allowed ranges. Does not know: what goes together (`setting_rules`), what
the values are used for.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from molmo_server.setting_rules import checked_engine_url, contradictions, is_checkpoint

_MIB = 1024 * 1024
_PREFIX = "MOLMO_"
_NOT_SETTINGS = ("MOLMO_API_KEY", "MOLMO_SERVER", "MOLMO_GATE_CANDIDATE", "MOLMO_GATE_CURRENT")
"""Variables of the client, and what a gate is told."""


def misspelt_variables() -> list[str]:
    """What is wrong with variables of the environment that look like settings and are none."""
    known = {f"{_PREFIX}{name.upper()}" for name in MolmoSettings.model_fields} | set(_NOT_SETTINGS)
    complaints = []
    for name in sorted(name for name in os.environ if name.startswith(_PREFIX)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            complaints.append(f"{name} is no setting and has no effect{meant}")
    return complaints


class MolmoSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 lets the system choose."""
    checkpoint: Path | None = None
    """A folder in the released layout; None: the small model that comes with the package."""
    store: str | None = None
    """A store of published checkpoints, a folder or the URL of an object store (`s3://…`); the
    current one is served, unless `checkpoint` is given."""
    cache_dir: Path = Path("~/.cache/molmo")
    """For checkpoints that were downloaded or converted."""
    follows_store: bool = True
    """Load what becomes current in the store, without being told."""
    admin_key: SecretStr | None = None
    """Allows the routes under /admin; without it only a key of scope admin does."""
    keys: str | None = Field(default=None, repr=False)
    """The file of API keys that `molmo keys` writes, or the postgresql:// URL of a database that
    several servers share; None: whoever comes is served."""
    limits: str | None = Field(default=None, repr=False)
    """The redis:// URL of a server where the limits of keys are counted for several servers; None:
    each server counts its own."""
    served_name: str = "molmo2"
    models: dict[str, str] = {}
    """More models, each with engines of its own: name → folder of a checkpoint, or store."""
    run_dir: Path | None = None
    """Logs of the engine; None: a private temporary folder, removed at a clean end."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str | None = None
    """Where traces are sent: the base URL of an OTLP/HTTP collector, as http://127.0.0.1:4318."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web pages that may ask, as https://app.example.org, with commas between them; `*`: all."""

    # Connections
    max_connections: int = Field(default=1000, ge=1)
    """More are refused at once with 503."""
    head_timeout_s: float = Field(default=10, gt=0)
    """Within so long a request's head must have arrived, from its first byte or the connection."""
    keep_alive_s: float = Field(default=5, gt=0)
    """An idle connection is kept for another request so long."""
    write_timeout_s: float = Field(default=60, gt=0)
    """A caller that does not take what it is sent is cut off after so long."""

    # Engine
    n_engines: int | None = Field(default=None, ge=0, le=64)
    """Processes of our own, of each model; None: one, or none where `engine_urls` names others."""
    engine_devices: Annotated[tuple[str, ...], NoDecode] = ()
    """What each process of ours sees as CUDA_VISIBLE_DEVICES, in turn; in the environment with
    semicolons between them (`0;1`, or `0,1;2,3`). Empty: all see all."""
    engine_urls: Annotated[tuple[str, ...], NoDecode] = ()
    """Engines that run elsewhere (their checkpoint is still read here), beside our own; in the
    environment with commas between them."""
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and answer; None: what the checkpoint allows."""
    n_threads: int | None = Field(default=None, ge=1)
    kv_cache_gib: int = Field(default=1, ge=1)
    frame_cache_gib: float = Field(default=0.5, ge=0)
    """Decoded frames that the engine remembers, so that a known video is not decoded again."""
    is_eager: bool = True
    drafts: Literal["auto", "on", "off"] = "auto"
    """Answers that point are drafted ahead and verified many tokens a step; auto: on CPUs."""
    start_timeout_s: float = Field(default=1200, gt=0)
    health_interval_s: float = Field(default=1, gt=0)
    health_timeout_s: float = Field(default=5, gt=0)
    hang_grace_s: float = Field(default=30, gt=0)
    """An engine that does not answer for so long is killed and started again."""
    swap_way: Literal["auto", "in_place", "blue_green"] = "auto"
    """Other weights in place, or a second engine beside the first; auto: in place where that is
    possible and nothing is to be examined first, else a second one if there is memory for it."""
    gate_command: str = ""
    """Run for a checkpoint on a second engine before it is served; only exit code 0 lets it pass.
    It finds MOLMO_SERVER, MOLMO_GATE_CANDIDATE and MOLMO_GATE_CURRENT (names of models there)."""
    gate_s: float = Field(default=3600, gt=0)
    canary_share: float = Field(default=0, ge=0, le=1)
    """Of requests, answered by a second engine before it takes over."""
    shadow_share: float = Field(default=0, ge=0, le=1)
    """Of greedy answers in one piece, given by a second engine as well and compared."""
    canary_s: float = Field(default=60, gt=0)
    least_same: float = Field(default=0, ge=0, le=1)
    """Share of compared answers that must be equal."""
    swap_drain_s: float = Field(default=120, gt=0)
    """How long requests in flight may hold up other weights."""
    swap_load_s: float = Field(default=600, gt=0)
    probe_tolerance: float = Field(default=1e-2, gt=0)
    """Of the log-probabilities published with a checkpoint, in nats; 16 bits need about 0.3."""
    first_backoff_s: float = Field(default=1, gt=0)
    longest_backoff_s: float = Field(default=60, gt=0)
    max_failed_starts: int = Field(default=3, ge=1)
    """So many starts in a row without becoming ready end the attempts."""
    drain_s: float = Field(default=30, ge=0)
    """How long requests in flight may go on when the service ends."""
    leave_notice_s: float = Field(default=0, ge=0)
    """When told to end, `/ready` says 503 for so long while requests are still taken."""

    # Admission
    max_body_bytes: int = Field(default=64 * _MIB, ge=1)
    body_timeout_s: float = Field(default=60, gt=0)
    """Within so long a request must have arrived."""
    max_concurrent: int = Field(default=16, ge=1)
    max_queued: int = Field(default=64, ge=0)
    deadline_s: float = Field(default=120, gt=0)

    # Media
    max_images: int = Field(default=4, ge=1)
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    max_image_side_px: int = Field(default=10_000, ge=1)
    max_aspect: float = Field(default=200, ge=1)
    max_video_bytes: int = Field(default=64_000_000, ge=1)
    max_video_duration_s: float = Field(default=600, gt=0)
    max_video_side_px: int = Field(default=4096, ge=1)
    max_video_frames: int = Field(default=100_000, ge=1)
    """In the file, whatever of it is looked at: 600 s at 120 a second are 72,000."""
    probe_timeout_s: float = Field(default=20, gt=0)
    """Wall clock and processor time of the child that looks at one video or large picture."""
    probe_memory_bytes: int = Field(default=2048 * _MIB, ge=1)
    max_probes: int = Field(default=2, ge=1)
    """Most media looked at at the same time."""
    media_cache_entries: int = Field(default=64, ge=0)
    """So many files are remembered by their digest and not looked at again."""

    # Uploads
    media_dir: Path | None = None
    """Of this server alone; None: a private temporary folder, removed at a clean end."""
    media_ttl_s: float = Field(default=24 * 3600, gt=0)
    """A file that was not used for so long is removed."""
    media_quota_bytes: int = Field(default=4096 * _MIB, ge=1)
    """Of one tenant; above it their least recently used files are removed."""

    # Files and batches
    batch_dir: Path | None = None
    """Of this server alone; None: a private temporary folder, removed at a clean end."""
    max_file_bytes: int = Field(default=200_000_000, ge=1)
    max_batch_lines: int = Field(default=50_000, ge=1)
    batch_concurrent: int = Field(default=4, ge=1)
    """Most lines of batches asked at the same time."""
    max_batches: int = Field(default=32, ge=1)
    """Most batches of one tenant that have not ended."""
    files_quota_bytes: int = Field(default=4096 * _MIB, ge=1)
    """Most bytes of files that one tenant may keep."""
    files_ttl_s: float = Field(default=30 * 24 * 3600, ge=1)
    """After so long files are removed, and batches that have ended."""

    # Media of other servers
    remote_media: Literal["off", "allowlist", "public"] = "off"
    """Whose http(s) URLs are fetched: nobody's, those of `remote_hosts`, every public server's."""
    remote_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host names, exact or `*.example.org`; in the environment with commas between them."""
    remote_allow_http: bool = False
    remote_timeout_s: float = Field(default=10, gt=0)
    """For one file with its redirects, from the look-up of the name to the last byte."""
    remote_max_redirects: int = Field(default=3, ge=0)

    # Answers
    default_max_tokens: int = Field(default=1024, ge=1)
    max_tokens_limit: int = Field(default=4096, ge=1)
    constrains_verbs: bool = True
    """Point, count and track decode under a grammar, unless a request says otherwise."""
    gives_confidence: bool = False
    """Their places come with a confidence, unless a request says otherwise."""
    max_labels: int = Field(default=8, ge=1)
    """Objects, or points to go on from, in one request."""
    max_choices: int = Field(default=4, ge=1)
    max_logprobs: int = Field(default=20, ge=0)
    max_stops: int = Field(default=8, ge=0)
    max_prompts: int = Field(default=16, ge=1)
    """Texts in one request to /v1/completions."""
    max_prompt_values: int = Field(default=2048, ge=1)
    """Tokens of a prompt of which log-probabilities are told; each takes the engine about 1 MB
    for a moment, with a vocabulary of 152 000."""
    max_schema_bytes: int = Field(default=16_384, ge=2)
    """Of a JSON schema that an answer is held to."""

    @field_validator("store", "keys", mode="before")
    @classmethod
    def _as_text(cls, place: Any) -> Any:
        return str(place) if isinstance(place, Path) else place

    @field_validator("cache_dir", "media_dir", "batch_dir")
    @classmethod
    def _of_the_user(cls, folder: Path | None) -> Path | None:
        return folder and folder.expanduser()

    @field_validator("remote_hosts", "cors_origins", mode="before")
    @classmethod
    def _with_commas(cls, names: Any) -> Any:
        many = names.split(",") if isinstance(names, str) else names
        return tuple(name.strip().lower() for name in many if name.strip())

    @field_validator("engine_devices", mode="before")
    @classmethod
    def _with_semicolons(cls, devices: Any) -> Any:
        many = devices.split(";") if isinstance(devices, str) else devices
        return tuple(one.strip() for one in many if one.strip())

    @field_validator("engine_urls", mode="before")
    @classmethod
    def _as_addresses(cls, urls: Any) -> Any:
        many = urls.split(",") if isinstance(urls, str) else urls
        return tuple(checked_engine_url(url) for url in many if url.strip())

    @model_validator(mode="after")
    def _check_contradictions(self) -> MolmoSettings:
        if complaint := next(contradictions(self), None):
            raise ValueError(complaint)
        return self

    def of_models(self) -> list[MolmoSettings]:
        """These settings as each model has them, the one without a name in `models` first."""
        others = (
            self.model_copy(
                update={
                    "served_name": name,
                    "models": {},
                    "checkpoint": Path(where) if is_checkpoint(where) else None,
                    "store": None if is_checkpoint(where) else where,
                    "n_engines": self._n_of_others,
                    "engine_urls": (),
                    "n_threads": self.n_threads or self._share_of_cores,
                }
            )
            for name, where in self.models.items()
        )
        return [self, *others]

    @property
    def _n_of_others(self) -> int:
        """Processes of each model in `models`."""
        return self.n_engines or 1

    @property
    def _share_of_cores(self) -> int:
        """Of one process on this machine: left to itself each would take them all."""
        n_processes = self.n_own_engines + len(self.models) * self._n_of_others
        return max(len(os.sched_getaffinity(0)) // max(n_processes, 1), 1)

    @property
    def n_own_engines(self) -> int:
        if self.n_engines is not None:
            return self.n_engines
        return 0 if self.engine_urls else 1

    @property
    def engine_threads(self) -> int | None:
        """The packaged model is small: with one thread it starts in less time and memory."""
        if self.n_threads is not None:
            return self.n_threads
        if self.checkpoint is None and self.store is None:
            return 1
        is_alone = self.n_own_engines == 1 and not self.models
        return None if is_alone else self._share_of_cores
