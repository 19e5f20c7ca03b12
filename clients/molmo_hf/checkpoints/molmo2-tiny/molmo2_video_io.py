"""Decode chosen frames of a video file, and only those.

torchcodec where it loads, PyAV otherwise; both take the frame that is displayed at a time, by
presentation order, and turn it as the file's display matrix says. Knows: codecs. Does not know:
which times to choose (`molmo_core.videos`), prompts. Imported by nothing an export carries.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

try:
    import av
except ImportError:
    av = None
import numpy as np
from numpy.typing import NDArray

from .molmo2_errors import InvalidMedia
from .molmo2_images import resize_bilinear
from .molmo2_videos import VideoInfo, probe_video

Source = bytes | str | PathLike[str]
Frame = NDArray[np.uint8]

_FRAMES_AT_ONCE = 16
_SEEK_FROM_S = 4.0  # decoding on is cheaper than seeking when the next frame is nearer


def decode_frames(
    source: Source,
    times_s: Sequence[float],
    *,
    info: VideoInfo | None = None,
    size_hw: tuple[int, int] | None = None,
) -> Frame:
    """Return the frames displayed at `times_s` (seconds from the first frame): (T, H, W, 3) RGB.

    With `size_hw` each frame is resized as it comes, so memory holds T frames of that size.
    Raises InvalidMedia when a frame cannot be decoded.
    """
    info = info or probe_video(source)
    indices = [info.frame_at(t) for t in times_s]
    wanted = sorted(set(indices))
    decode = _decode_torchcodec if _has_torchcodec() else decode_pyav
    frames: dict[int, Frame] = {}
    try:
        for index, frame in zip(wanted, decode(source, wanted, info), strict=True):
            frames[index] = resize_bilinear(frame, size_hw) if size_hw else frame
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        raise InvalidMedia(
            f"the video has a frame that cannot be decoded ({type(error).__name__}); "
            "send a complete file"
        ) from error
    return np.stack([frames[i] for i in indices])


def _has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401 - may be installed without a usable ffmpeg
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _decode_torchcodec(source: Source, indices: Sequence[int], _: VideoInfo) -> Iterator[Frame]:
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        VideoDecoder = None

    opened: Any = source if isinstance(source, bytes) else str(source)
    decoder = VideoDecoder(opened, dimension_order="NHWC", seek_mode="exact")
    for begin in range(0, len(indices), _FRAMES_AT_ONCE):
        portion = list(indices[begin : begin + _FRAMES_AT_ONCE])
        yield from decoder.get_frames_at(indices=portion).data.numpy()


def decode_pyav(source: Source, indices: Sequence[int], info: VideoInfo) -> Iterator[Frame]:
    """Decode the frames with ascending `indices`; seeks over long gaps."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with av.open(opened, mode="r") as container:
        stream = container.streams.video[0]
        base = stream.time_base
        assert base is not None  # probe_video read times with it
        reached_s = 0.0
        decoded = container.decode(stream)
        for index in indices:
            time_s = info.frame_times_s[index]
            wanted_pts = round((time_s + info.begin_s) / base)
            if time_s - reached_s > _SEEK_FROM_S:
                container.seek(wanted_pts, stream=stream, backward=True)
                decoded = container.decode(stream)
            yield _upright(next(f for f in decoded if f.pts is not None and f.pts >= wanted_pts))
            reached_s = time_s


def _upright(frame: Any) -> Frame:
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=frame.rotation // 90))

import typing

if typing.TYPE_CHECKING:  # never run: tells transformers 4.57 which files to copy
    from .molmo2_tokens import *  # noqa: F403
