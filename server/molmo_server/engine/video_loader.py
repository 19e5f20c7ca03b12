"""vLLM's `molmo2` video loader, time-based and frugal; registered in place of the stock one.

Reads the frame times of a file from its packets, chooses target times as in training, decodes
only the frames displayed at them and brings each to the crop size at once: 384 frames of any
video need 165 MB. The times travel as metadata to the prompt. What was decoded is remembered
(`FrameCache`): another question about the video decodes nothing.

The settings of the checkpoint come as the engine's media settings (see `launch`), those of a
request replace some of them; without them nothing is guessed, and what is unknown or out of range
is refused. Knows: vLLM 0.32's loader interface. Does not know: where bytes came from.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter
from vllm.multimodal.video import VideoLoader

from molmo_core.api_requests import MOST_FPS
from molmo_core.errors import InvalidRequest
from molmo_core.videos import VideoGeometry
from molmo_hf.video_io import sample_file
from molmo_hf.video_processing_molmo2 import FRAME_TIMES

DECODES = Counter("molmo_video_decodes", "Videos that were decoded, not taken from the memory")

_TRAINED = {
    "frame_sample_mode",
    "max_fps",
    "sampling_fps",
    "crop_px",
    "most_frames",
    "frame_cache_bytes",
}
_ASKED = {"asked_fps", "start_s", "end_s"}


class DecodedClip(NamedTuple):
    frames: NDArray[np.uint8]
    """(T, side, side, 3), shared: nobody may write into them."""
    metadata: dict[str, Any]


class FrameCache:
    """Decoded frames within a budget of bytes; the least recently used go first.

    vLLM hashes a medium after it was decoded, so its own caches spare a second question about a
    video everything but the decoding. Used by the threads that load media: whoever asks for what
    another one is just decoding waits for that.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._clips: OrderedDict[Hashable, Future[DecodedClip]] = OrderedDict()
        """Also those that are being decoded; only decoded ones count and go."""
        self.n_bytes = 0

    def get(
        self, key: Hashable, decode: Callable[[], DecodedClip], *, budget_bytes: int
    ) -> DecodedClip:
        """The clip of `key`; `decode` makes it where it is not there, and what it raises is raised
        for everybody who waits for it."""
        mine: Future[DecodedClip] | None = None
        with self._lock:
            known = self._clips.get(key)
            if known is None:
                known = mine = self._clips[key] = Future()
            self._clips.move_to_end(key)
        if mine is None:
            return known.result()
        try:
            clip = decode()
        except BaseException as error:
            with self._lock:
                del self._clips[key]
            mine.set_exception(error)
            raise
        mine.set_result(clip)
        with self._lock:
            self.n_bytes += clip.frames.nbytes
            self._make_room(budget_bytes)
        return clip

    def _make_room(self, budget_bytes: int) -> None:
        decoded = [key for key, clip in self._clips.items() if clip.done()]
        for key in decoded:
            if self.n_bytes <= budget_bytes:
                break
            self.n_bytes -= self._clips.pop(key).result().frames.nbytes


_cache = FrameCache()


class TimedVideoLoader(VideoLoader):
    """Frames at the trained times, with those times."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = -1, **settings: Any
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Returns frames (T, side, side, 3) and metadata; `num_frames` is the most frames.

        Raises ValueError (a 400 to the caller) when the bytes hold no readable video, or the
        settings are not those that the gateway may send.
        """
        # Beside the settings only what sets tenants apart may come: it is part of vLLM's keys too.
        tenant = settings.pop("tenant", "")
        geometry = _geometry(num_frames, settings)
        clip = _cache.get(
            (hashlib.sha256(data).digest(), geometry, tenant),
            lambda: _decode(data, geometry),
            budget_bytes=settings["frame_cache_bytes"],
        )
        return clip.frames, dict(clip.metadata)


def _decode(data: bytes, geometry: VideoGeometry) -> DecodedClip:
    DECODES.inc()
    try:
        info, times, frames = sample_file(data, geometry)
    except InvalidRequest as error:
        raise ValueError(error.message) from error
    frames.setflags(write=False)
    metadata = {
        "fps": info.fps,
        "duration": info.duration_s,
        "total_num_frames": info.n_frames,
        "frames_indices": [info.frame_at(t) for t in times.file_s],
        "video_backend": "molmo2",
        "do_sample_frames": False,
        FRAME_TIMES: list(times.clip_s),
    }
    return DecodedClip(frames, metadata)


def _geometry(num_frames: int, settings: dict[str, Any]) -> VideoGeometry:
    if missing := _TRAINED - settings.keys():
        raise ValueError(
            f"the engine was started without the video settings {sorted(missing)}; start it with "
            "molmo_server.engine.launch.engine_command, which takes them from the checkpoint"
        )
    if unknown := settings.keys() - _TRAINED - _ASKED:
        raise ValueError(f"got the unknown video settings {sorted(unknown)}; leave them out")
    asked_fps, start_s = settings.get("asked_fps"), settings.get("start_s", 0.0)
    end_s = settings.get("end_s")
    if not 1 <= num_frames <= settings["most_frames"]:
        raise ValueError(f"got num_frames {num_frames}, allowed are 1 to {settings['most_frames']}")
    if asked_fps is not None and not 0 < asked_fps <= MOST_FPS:
        raise ValueError(f"got asked_fps {asked_fps}, allowed are up to {MOST_FPS:g}; ask for less")
    if not all(math.isfinite(t) and t >= 0 for t in (start_s, end_s or 0.0)):
        raise ValueError(f"got the part from {start_s} to {end_s} s; send seconds from 0 on")
    return VideoGeometry(
        sample_mode=settings["frame_sample_mode"],
        max_frames=num_frames,
        max_fps=settings["max_fps"],
        sampling_fps=settings["sampling_fps"],
        crop_px=settings["crop_px"],
        asked_fps=asked_fps,
        start_s=start_s,
        end_s=end_s,
    )
