"""vLLM's `molmo2` video loader, time-based and frugal; registered in place of the stock one.

Reads the frame times of a file from its packets, chooses target times as in training, decodes
only the frames displayed at them and brings each to the crop size at once: 384 frames of any
video need 165 MB. The times travel as metadata to the prompt.

The settings of the checkpoint come as the engine's media settings (see `launch`); without them
nothing is guessed. Knows: vLLM 0.32's loader interface. Does not know: where bytes came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.multimodal.video import VideoLoader

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoGeometry, probe_video, sample_times
from molmo_hf.video_io import decode_frames
from molmo_hf.video_processing_molmo2 import FRAME_TIMES


class TimedVideoLoader(VideoLoader):
    """Frames at the trained times, with those times."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = -1, **settings: Any
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Returns frames (T, side, side, 3) and metadata; `num_frames` is the most frames.

        Raises ValueError (a 400 to the caller) when the bytes hold no readable video.
        """
        geometry = _geometry(num_frames, settings)
        try:
            info = probe_video(data)
            times = sample_times(info.duration_s, geometry, source_fps=info.fps)
            side = geometry.crop_px
            frames = decode_frames(data, times, info=info, size_hw=(side, side))
        except InvalidMedia as error:
            raise ValueError(error.message) from error
        return frames, {
            "fps": info.fps,
            "duration": info.duration_s,
            "total_num_frames": info.n_frames,
            "frames_indices": [info.frame_at(t) for t in times],
            "video_backend": "molmo2",
            "do_sample_frames": False,
            FRAME_TIMES: times,
        }


def _geometry(num_frames: int, settings: dict[str, Any]) -> VideoGeometry:
    missing = {"frame_sample_mode", "max_fps", "sampling_fps", "crop_px"} - settings.keys()
    if missing:
        raise ValueError(
            f"the engine was started without the video settings {sorted(missing)}; start it with "
            "molmo_server.engine.launch.engine_command, which takes them from the checkpoint"
        )
    return VideoGeometry(
        sample_mode=settings["frame_sample_mode"],
        max_frames=num_frames,
        max_fps=settings["max_fps"],
        sampling_fps=settings["sampling_fps"],
        crop_px=settings["crop_px"],
    )
