"""What a request asks of its media beyond the trained defaults, for the gateway and the engine.

The gateway counts tokens and samples times with `image_geometry` and `video_geometry`; an engine
of ours gets `engine_fields`, which its media settings are replaced by, checks them again, and
computes the same. They are part of vLLM's keys of media, so no cache confuses two of them.

Knows: both sides' names. Does not know: ranges (`molmo_core.api_requests`), files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from molmo_core.api_requests import MediaOptions
from molmo_core.errors import InvalidRequest
from molmo_core.images import ImageGeometry
from molmo_core.videos import VideoGeometry
from molmo_server.checkpoints.folder import Checkpoint
from molmo_server.media.gate import CheckedMedia

_OF_VIDEOS = ("max_frames", "fps", "start", "end")


def check_options(options: MediaOptions, media: CheckedMedia) -> None:
    """Raises InvalidRequest for an option of another kind of media than there is."""
    for name in options.model_dump(exclude_none=True):
        is_of_videos = name in _OF_VIDEOS
        kind, there = ("a video", media.video) if is_of_videos else ("pictures", media.images)
        if not there:
            raise InvalidRequest(
                f"got media_options.{name}, which is of {kind}, and the request has none; leave it "
                "out",
                param=f"media_options.{name}",
            )


def image_geometry(trained: ImageGeometry, options: MediaOptions) -> ImageGeometry:
    return replace(trained, max_crops=options.max_crops or trained.max_crops)


def video_geometry(trained: VideoGeometry, options: MediaOptions) -> VideoGeometry:
    return replace(
        trained,
        max_frames=options.max_frames or trained.max_frames,
        asked_fps=options.fps,
        start_s=options.start or 0.0,
        end_s=options.end,
    )


def looking_closer(checkpoint: Checkpoint, options: MediaOptions) -> Checkpoint:
    """As if the checkpoint had been trained so."""
    return replace(
        checkpoint,
        image=image_geometry(checkpoint.image, options),
        video=video_geometry(checkpoint.video, options),
    )


def engine_fields(options: MediaOptions, *, tenant_salt: str) -> dict[str, Any]:
    """Fields of a chat request to an engine of ours; none where nothing is asked for.

    `tenant_salt` keeps what the engine remembers of one tenant's media from another's.
    """
    tenant = {"tenant": tenant_salt or None}
    wanted: dict[str, dict[str, Any]] = {
        "image": tenant,
        "video": {
            "num_frames": options.max_frames,
            "asked_fps": options.fps,
            "start_s": options.start,
            "end_s": options.end,
            **tenant,
        },
    }
    media = {kind: _given(fields) for kind, fields in wanted.items() if _given(fields)}
    crops = _given({"max_crops": options.max_crops})
    engine = {"media_io_kwargs": media, "mm_processor_kwargs": crops}
    return {name: fields for name, fields in engine.items() if fields}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
