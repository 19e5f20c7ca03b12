"""Which frames of a video the model sees, when, and how they are written as tokens.

Knows: time-based sampling (as in training), index-based sampling (as stock loaders do it, for
comparison), the token layout of a video, and how to read the frame times of a file without
decoding it. Does not know: pixels beyond one frame's size, tokenizers, torch.

Times are seconds from the first frame. Source: Molmo2's time sampler; spec of frame sampling.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Literal, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidMedia, InvalidRequest
from molmo_core.images import ImageGrid, PreparedImage, pool_indices
from molmo_core.pixels import normalised, resize_bilinear, to_patches
from molmo_core.tokens import FRAME_END, FRAME_START, IM_COL, IM_END, IM_PATCH, IM_START

SampleMode = Literal["uniform_last_frame", "fps"]
_MAX_STREAMS = 16  # of which a frame is spared; more cost no more than time


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """How frames are sampled and cut; the defaults are those of the released checkpoints."""

    crop_px: int = 378
    patch_px: int = 14
    pooling_hw: tuple[int, int] = (3, 3)
    sample_mode: SampleMode = "uniform_last_frame"
    max_frames: int = 384
    max_fps: float | None = 2.0
    sampling_fps: float = 2.0
    """Base rate of the mode "fps": candidate rates are its multiples."""
    asked_fps: float | None = None
    """Frames a second instead of what the mode chooses."""
    start_s: float = 0.0
    end_s: float | None = None
    """The part of a file that is sampled; None: to its end."""
    use_col_tokens: bool = False
    use_frame_special_tokens: bool = True

    @property
    def frame_rows(self) -> int:
        return -(-(self.crop_px // self.patch_px) // self.pooling_hw[0])

    @property
    def frame_cols(self) -> int:
        return -(-(self.crop_px // self.patch_px) // self.pooling_hw[1])


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says of its video stream; `frame_times_s` starts at 0 and ascends."""

    width_px: int
    height_px: int
    fps: float
    duration_s: float
    frame_times_s: tuple[float, ...]
    begin_s: float
    """Presentation time of the first frame in the file's own clock."""

    @property
    def n_frames(self) -> int:
        return len(self.frame_times_s)

    def frame_at(self, time_s: float) -> int:
        """Index of the frame displayed at `time_s`; the last one at and after the end."""
        index = int(np.searchsorted(self.frame_times_s, time_s + 1e-6, side="right")) - 1
        return min(max(index, 0), self.n_frames - 1)


class FrameTimes(NamedTuple):
    """When frames are taken: as in training a part of a file is a clip that begins at 0."""

    start_s: float
    clip_s: tuple[float, ...]
    """What the model is told, seconds from `start_s`."""

    @property
    def file_s(self) -> list[float]:
        return [self.start_s + time_s for time_s in self.clip_s]


def probe_video(source: bytes | str | PathLike[str]) -> VideoInfo:
    """Read frame times and size from the packets of a file; no frame is decoded.

    Raises InvalidMedia when the source holds no readable video frames.
    """
    with opened_video(source) as container:
        return scan_video(container)


@contextmanager
def opened_video(
    source: bytes | str | PathLike[str], *, believes_header: bool = False
) -> Iterator[av.container.InputContainer]:
    """A file with a video stream; what reading it raises inside the block becomes InvalidMedia.

    Opening decodes a frame to learn what it is; with `believes_header` it does not, and nothing
    is known but what the header says.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    of_streams = [{"skip_frame": "all"}] * _MAX_STREAMS if believes_header else None
    try:
        with av.open(opened, mode="r", stream_options=of_streams) as container:
            if not container.streams.video:
                raise InvalidMedia(
                    "the file has no video stream; send a video (mp4, mov, webm or mkv)"
                )
            yield container
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InvalidMedia(
            f"the video cannot be read ({type(error).__name__}); "
            "send a complete mp4, mov, webm or mkv file"
        ) from error


def scan_video(container: av.container.InputContainer) -> VideoInfo:
    """As `probe_video`, of a file that is open; reads to its end."""
    stream = container.streams.video[0]
    base = stream.time_base
    times, ends = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        ends.append(packet.pts + (packet.duration or 0))
    if not times or base is None:
        raise InvalidMedia("the video has no frames; send a file with at least one decodable frame")
    times.sort()
    begin = times[0]
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    end = max(
        max(ends), times[-1] + (0 if ends[-1] > times[-1] or not fps else int(1 / fps / base))
    )
    return VideoInfo(
        width_px=stream.codec_context.width,
        height_px=stream.codec_context.height,
        fps=fps,
        duration_s=float((end - begin) * base),
        frame_times_s=tuple(float((t - begin) * base) for t in times),
        begin_s=float(begin * base),
    )


def sample_part(info: VideoInfo, geometry: VideoGeometry) -> FrameTimes:
    """The frames of the geometry's part of a file; raises InvalidRequest for a part outside."""
    start_s, end_s = geometry.start_s, info.duration_s
    if geometry.end_s is not None:
        end_s = min(geometry.end_s, end_s)
    if not start_s < end_s:
        raise InvalidRequest(
            f"the part from {start_s:g} s to {end_s:g} s of a video of {info.duration_s:g} s is "
            "empty; give a start before the end of the video and of the part",
            param="media_options",
        )
    times = sample_times(end_s - start_s, geometry, source_fps=info.fps)
    return FrameTimes(start_s, tuple(times))


def sample_times(
    duration_s: float,
    geometry: VideoGeometry,
    *,
    source_fps: float | None = None,
    max_candidate_fps: float = 8.0,
) -> list[float]:
    """Times at which frames are taken, as in training.

    `uniform_last_frame`: every 1/max_fps seconds and the end; spread evenly over the clip when
    that would exceed `max_frames`. `fps`: the highest rate among the multiples of `sampling_fps`
    that divide the source's rate and still cover the clip with `max_frames`.

    Raises ValueError for mode "fps" without `source_fps`.
    """
    if geometry.sample_mode == "fps":
        if source_fps is None:
            raise ValueError("sampling mode 'fps' needs the frame rate of the source")
        rate = geometry.asked_fps or _best_rate(duration_s, geometry, source_fps, max_candidate_fps)
        times = np.arange(geometry.max_frames) / rate
        return [float(t) for t in times if t < duration_s]
    n, max_fps = geometry.max_frames, geometry.asked_fps or geometry.max_fps
    if max_fps is None or duration_s > (n - 1) / max_fps:
        return [float(t) for t in np.linspace(0, duration_s, num=n, endpoint=True)]
    spaced = np.arange(0.0, duration_s, step=1 / max_fps)
    return [*(float(t) for t in spaced), float(duration_s)]


def _best_rate(duration_s: float, geometry: VideoGeometry, source_fps: float, cap: float) -> float:
    base = int(geometry.sampling_fps)
    whole = int(source_fps)
    divisors = [float(r) for r in range(base, int(cap) + 1, base) if whole % r == 0]
    rates = divisors or [float(geometry.sampling_fps)]
    covering = [r for r in rates if geometry.max_frames / r >= duration_s]
    return float(max(covering, default=min(rates)))


def sample_indices(n_frames: int, fps: float, geometry: VideoGeometry) -> list[int]:
    """Index-based sampling as stock loaders do it (mode `uniform_last_frame`); for comparison."""
    if n_frames <= 2:
        return list(range(n_frames))
    n, max_fps = geometry.max_frames, geometry.max_fps
    if max_fps is None or n_frames / fps > (n - 1) / max_fps:
        return [int(i) for i in np.linspace(0, n_frames - 1, num=min(n, n_frames), endpoint=True)]
    indices = [int(i) for i in np.round(np.arange(0.0, n_frames - 1, step=fps / max_fps))]
    return indices if indices[-1] == n_frames - 1 else [*indices, n_frames - 1]


def timestamp_text(time_s: float, *, is_first: bool) -> str:
    """What stands in front of a frame's tokens."""
    return f"{time_s:.1f} " if is_first else f" {time_s:.1f} "


def frame_tokens(geometry: VideoGeometry) -> list[str]:
    """The tokens of one frame, its timestamp not included."""
    start, end = (
        (FRAME_START, FRAME_END) if geometry.use_frame_special_tokens else (IM_START, IM_END)
    )
    row = [IM_PATCH] * geometry.frame_cols + ([IM_COL] if geometry.use_col_tokens else [])
    return [start, *(row * geometry.frame_rows), end]


def video_text(times_s: Sequence[float], geometry: VideoGeometry) -> str:
    """The whole video as text: timestamps and frame tokens in order."""
    frame = "".join(frame_tokens(geometry))
    return "".join(timestamp_text(t, is_first=k == 0) + frame for k, t in enumerate(times_s))


def prepare_frames(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], geometry: VideoGeometry
) -> PreparedImage:
    """Turn RGB frames (T, H, W, 3) into patches with their pooling index.

    Returns crops (T, patches, patch_px² · 3), pooling (T · rows · cols, window area) and as grid
    the visual tokens of one frame in its first two fields.
    """
    crops = cut_frames(frames, geometry)
    grid = ImageGrid(geometry.frame_rows, geometry.frame_cols, 0, 0)
    return PreparedImage(normalised(crops), frame_pooling(len(crops), geometry), grid)


def cut_frames(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], geometry: VideoGeometry
) -> NDArray[np.uint8]:
    """The crops of `prepare_frames` as bytes: (T, patches, patch_px² · 3)."""
    side = geometry.crop_px
    crops = np.stack([resize_bilinear(frame, (side, side)) for frame in frames])
    return to_patches(crops, geometry.patch_px)


def frame_pooling(n_frames: int, geometry: VideoGeometry) -> NDArray[np.int64]:
    """Patch indices that each visual token pools: (T · rows · cols, window area), −1 = none."""
    per_side = geometry.crop_px // geometry.patch_px
    n_patches = per_side * per_side
    one = pool_indices(np.arange(n_patches).reshape(per_side, per_side), geometry.pooling_hw)
    offsets = (np.arange(n_frames) * n_patches)[:, None, None]
    return np.where(one[None] >= 0, one[None] + offsets, -1).reshape(-1, one.shape[1])
