"""Settings of the service; the one place of this package that reads the environment.

Every field can be set as `MOLMO_<FIELD>` (`MOLMO_PORT=9000`); command line options of
`molmo serve` win over the environment. Sizes are bytes unless the name says otherwise.

Knows: names, defaults, allowed ranges. Does not know: what the values are used for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_MIB = 1024 * 1024
_HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9_-]+\.)+[a-z0-9-]+")


class MolmoSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MOLMO_", frozen=True, extra="forbid")

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
    keys: Path | None = None
    """The file of API keys that `molmo keys` writes; None: whoever comes is served."""
    served_name: str = "molmo2"
    run_dir: Path | None = None
    """Logs of the engine; None: a private temporary folder, removed at a clean end."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # Engine
    engine_url: str | None = None
    """An engine that runs elsewhere (its checkpoint is still read here); None: start one."""
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and answer; None: what the checkpoint allows."""
    n_threads: int | None = Field(default=None, ge=1)
    kv_cache_gib: int = Field(default=1, ge=1)
    is_eager: bool = True
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
    probe_timeout_s: float = Field(default=20, gt=0)
    """Wall clock and processor time of the child that looks at one video."""
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
    """Above it the least recently used files are removed."""

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
    constrains_verbs: bool = False
    """Point, count and track decode under a grammar, unless a request says otherwise."""
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

    @field_validator("store", mode="before")
    @classmethod
    def _as_text(cls, store: Any) -> Any:
        return str(store) if isinstance(store, Path) else store

    @field_validator("cache_dir", "media_dir")
    @classmethod
    def _of_the_user(cls, folder: Path | None) -> Path | None:
        return folder and folder.expanduser()

    @field_validator("remote_hosts", mode="before")
    @classmethod
    def _with_commas(cls, hosts: Any) -> Any:
        many = hosts.split(",") if isinstance(hosts, str) else hosts
        return tuple(host.strip().lower() for host in many if host.strip())

    @model_validator(mode="after")
    def _check_hosts(self) -> MolmoSettings:
        if (self.remote_media == "allowlist") != bool(self.remote_hosts):
            raise ValueError(
                f"remote_media is {self.remote_media} and remote_hosts names "
                f"{len(self.remote_hosts)} hosts; set remote_media to allowlist and name hosts, or "
                "leave remote_hosts out"
            )
        for host in self.remote_hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"remote_hosts has {host!r}; name hosts as example.org or *.example.org, "
                    "without scheme, port and path, in punycode where they are not ASCII"
                )
        return self

    @model_validator(mode="after")
    def _check_way(self) -> MolmoSettings:
        examined = [
            name for name in ("gate_command", "canary_share", "shadow_share") if getattr(self, name)
        ]
        if self.swap_way == "in_place" and examined:
            raise ValueError(
                f"{examined[0]} needs a second engine, and swap_way is in_place; leave one out"
            )
        return self

    @property
    def engine_threads(self) -> int | None:
        """The packaged model is small: with one thread it starts in less time and memory."""
        is_packaged = self.checkpoint is None and self.store is None
        return 1 if self.n_threads is None and is_packaged else self.n_threads
