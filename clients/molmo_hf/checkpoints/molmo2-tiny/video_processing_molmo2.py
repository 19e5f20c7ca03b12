"""Molmo2's video processor: clips in, patches, pooling index and frame times out.

Knows: kinds of clip a caller may hand over, the fields of a released
`video_preprocessor_config.json`. Does not know: the arithmetic (`molmo_core.videos`), decoding
(`video_io`), tokens, text. Native to transformers 5, importable under 4.57; an export carries it.

A file is sampled by time, as in training. Frames that come with their times are never sampled
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .molmo2_errors import InvalidMedia
from .molmo2_videos import SampleMode, VideoGeometry, VideoInfo, prepare_frames, sample_times

from .image_processing_molmo2 import BILINEAR, require_trained_pixels, rgb_pixels, square_size, without_loader_settings
from .molmo2_video_io import sample_file

FRAME_TIMES = "frame_times_s"
"""Key of a clip's metadata: the target time of each frame, in seconds from the first frame."""


class SampledClip(NamedTuple):
    """Frames as the model sees them; `times_s` None where the caller told none."""

    frames: Sequence[NDArray[np.uint8]]
    times_s: list[float] | None


class Molmo2VideosKwargs(VideosKwargs, total=False):
    """Settings that a caller may replace while loading."""

    patch_size: int
    pooling_size: list[int]
    frame_sample_mode: str
    max_fps: float
    sampling_fps: float


class Molmo2VideoProcessor(BaseVideoProcessor):
    """Chooses frames by time and turns each into patches, pixel for pixel as released."""

    model_input_names = [  # noqa: RUF012 - transformers' own form
        "pixel_values_videos",
        "video_token_pooling",
        "video_grids",
    ]
    valid_kwargs = Molmo2VideosKwargs

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        resample: int = BILINEAR,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        do_convert_rgb: bool = True,
        patch_size: int = 14,
        pooling_size: Sequence[int] = (3, 3),
        frame_sample_mode: SampleMode = "uniform_last_frame",
        num_frames: int = 384,
        max_fps: float | None = 2,
        sampling_fps: float = 2,
        do_sample_frames: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**without_loader_settings(kwargs))
        self.size = square_size(size)
        self.resample = resample
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.patch_size = patch_size
        self.pooling_size = list(pooling_size)
        self.frame_sample_mode = frame_sample_mode
        self.num_frames = num_frames
        self.max_fps = max_fps
        self.sampling_fps = sampling_fps
        self.do_sample_frames = do_sample_frames
        require_trained_pixels(resample, self.image_mean, self.image_std)

    def to_dict(self) -> dict[str, Any]:
        """Fields of the settings file; transformers 5 would leave an unlimited rate out."""
        return {**super().to_dict(), "max_fps": self.max_fps}

    def geometry(self) -> VideoGeometry:
        """How clips are sampled and cut; the fields on tokens keep their defaults."""
        return VideoGeometry(
            crop_px=self.size["height"],
            patch_px=self.patch_size,
            pooling_hw=(self.pooling_size[0], self.pooling_size[1]),
            sample_mode=self.frame_sample_mode,
            max_frames=self.num_frames,
            max_fps=self.max_fps,
            sampling_fps=self.sampling_fps,
        )

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Prepare one clip or (nested) lists of them.

        A clip is a path, the bytes of a file, or frames: an array (T, H, W, 3), or a list of
        pictures. Frames take metadata, in `video_metadata` or as (frames, metadata): a mapping
        with `frame_times_s`, or `fps` with or without `frames_indices`. Frames without
        `frames_indices` are the whole clip and are sampled; `do_sample_frames` True samples those
        with indices too, False takes all frames as they are. Files are always sampled.

        Returns `pixel_values_videos` (frames, patches, patch² · 3), `video_token_pooling`
        (tokens, window; indices count per clip, −1 = none), `video_grids` (n, 3); with
        `return_metadata` also `video_metadata`, which holds each clip's `frame_times_s`.
        Raises InvalidMedia for what is no clip, or does not fit its metadata.
        """
        geometry = self.geometry()
        clips = list(_with_metadata(videos, video_metadata))
        if not clips:
            raise InvalidMedia("no video was given; pass at least one")
        if do_sample_frames is None and not self.do_sample_frames:
            do_sample_frames = False
        sampled = [_sample(clip, told, geometry, do_sample_frames) for clip, told in clips]
        prepared = [prepare_frames(clip.frames, geometry) for clip in sampled]
        arrays = {
            "pixel_values_videos": np.concatenate([p.crops for p in prepared]),
            "video_token_pooling": np.concatenate([p.pooling for p in prepared]),
            "video_grids": np.array(
                [[len(p.crops), p.grid.low_rows, p.grid.low_cols] for p in prepared], np.int64
            ),
        }
        features = BatchFeature(arrays, tensor_type=return_tensors)
        if return_metadata:
            features["video_metadata"] = [{FRAME_TIMES: clip.times_s} for clip in sampled]
        return features


def _sample(
    clip: Any,
    metadata: Mapping[str, Any] | None,
    geometry: VideoGeometry,
    do_sample: bool | None,
) -> SampledClip:
    if isinstance(clip, bytes | str | PathLike):
        sampled = sample_file(clip, geometry)
        return SampledClip(sampled.frames, list(sampled.times.clip_s))
    frames = [rgb_pixels(frame) for frame in clip]
    if not frames:
        raise InvalidMedia("the video has no frames; give at least one")
    if metadata is None:
        return SampledClip(frames, None)
    told = metadata.get(FRAME_TIMES)
    if told is not None:
        return SampledClip(frames, _matching(told, frames))
    fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if not fps:
        raise InvalidMedia(
            f"the video's metadata has the keys {sorted(metadata)}; give '{FRAME_TIMES}', or "
            "'fps' (with 'frames_indices' where the frames are a choice)"
        )
    is_whole = indices is None
    times = _matching([i / fps for i in (range(len(frames)) if is_whole else indices)], frames)
    if do_sample or (do_sample is None and is_whole):
        return _resample(frames, times, fps, metadata.get("total_num_frames"), geometry)
    return SampledClip(frames, times)


def _matching(times_s: Sequence[float], frames: Sequence[Any]) -> list[float]:
    if len(times_s) != len(frames):
        raise InvalidMedia(
            f"the video's metadata speaks of {len(times_s)} frames, {len(frames)} came; "
            "give one entry a frame"
        )
    return [float(t) for t in times_s]


def _resample(
    frames: Sequence[NDArray[np.uint8]],
    times_s: list[float],
    fps: float,
    n_total: int | None,
    geometry: VideoGeometry,
) -> SampledClip:
    """Choose among decoded frames by time, as for a file."""
    info = VideoInfo(
        width_px=frames[0].shape[1],
        height_px=frames[0].shape[0],
        fps=fps,
        duration_s=n_total / fps if n_total else times_s[-1] + 1 / fps,
        frame_times_s=tuple(times_s),
        begin_s=0.0,
    )
    chosen = sample_times(info.duration_s, geometry, source_fps=fps)
    return SampledClip([frames[info.frame_at(t)] for t in chosen], chosen)


def _with_metadata(videos: Any, metadata: Any) -> Iterator[tuple[Any, Mapping[str, Any] | None]]:
    """Pair each clip with what is told of it."""
    told = list(_flat_metadata(metadata))
    clips = list(_flat_clips(videos))
    if told and len(told) != len(clips):
        raise InvalidMedia(f"got {len(clips)} videos and {len(told)} metadata; give one for each")
    for index, clip in enumerate(clips):
        if _is_pair(clip):
            yield clip[0], dict(clip[1])
        else:
            yield clip, told[index] if told else None


def _flat_metadata(metadata: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(metadata, Mapping):
        yield dict(metadata)  # transformers' own mapping fails on unknown keys
    elif metadata is not None:
        for item in metadata:
            yield from _flat_metadata(item)


def _flat_clips(videos: Any) -> Iterator[Any]:
    if videos is None:
        return
    if isinstance(videos, bytes | str | PathLike) or _is_pair(videos) or _is_frames(videos):
        yield videos
    elif isinstance(videos, list | tuple) or getattr(videos, "ndim", 0) == 5:
        for item in videos:
            yield from _flat_clips(item)
    else:
        raise InvalidMedia(
            f"got {type(videos).__name__} as video; give a path, the bytes of a file, or frames"
        )


def _is_pair(clip: Any) -> bool:
    return isinstance(clip, tuple) and len(clip) == 2 and isinstance(clip[1], Mapping)


def _is_frames(clip: Any) -> bool:
    if isinstance(clip, list | tuple):
        return bool(clip) and all(hasattr(f, "convert") or getattr(f, "ndim", 0) == 3 for f in clip)
    return getattr(clip, "ndim", 0) == 4

import typing

if typing.TYPE_CHECKING:  # never run: tells transformers 4.57 which files to copy
    from .molmo2_images import *  # noqa: F403
    from .molmo2_pixels import *  # noqa: F403
    from .molmo2_tokens import *  # noqa: F403
