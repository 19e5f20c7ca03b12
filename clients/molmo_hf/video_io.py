"""Decode chosen frames of a video file, and only those.

PyAV for the common kind of file, of which it decodes less; torchcodec where it loads, PyAV
otherwise, for all others. Both take the frame that is displayed at a time, by presentation order,
turn it as the file's display matrix says, and give the same bytes. Knows: codecs. Does not know:
which times to choose (`molmo_core.videos`), prompts. Imported by nothing an export carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidMedia
from molmo_core.pixels import resize_bilinear
from molmo_core.videos import (
    FrameTimes,
    VideoGeometry,
    VideoInfo,
    opened_video,
    probe_video,
    sample_part,
    scan_video,
)

Source = bytes | str | PathLike[str]
Frame = NDArray[np.uint8]
_Decode = Callable[[Sequence[int], VideoInfo], Iterator[Frame]]

_FRAMES_AT_ONCE = 16
# H.264 in 8 bits. Of 10 bits PyAV and torchcodec give other colours: torchcodec's hold.
_8_BITS = frozenset(f"yuv{j}{sampling}p" for j in ("", "j") for sampling in (420, 422, 444))
_SEEK_FROM_S = 4.0  # decoding on is cheaper than seeking when the next frame is nearer


class SampledFile(NamedTuple):
    info: VideoInfo
    times: FrameTimes
    frames: Frame


def sample_file(source: Source, geometry: VideoGeometry) -> SampledFile:
    """Choose a file's frames as in training and decode them at the size of a crop, in one go.

    Opening decodes a frame, the costliest of all: a file of the common kind is opened without,
    and once more in full where that told too little. Raises InvalidMedia for what cannot be read or
    decoded, InvalidRequest for a part outside.
    """
    with suppress(InvalidMedia), opened_video(source, believes_header=True) as container:
        if _says_enough(container):
            exactly = partial(_decode_pyav, container, is_exact=True)
            return _sampled(container, geometry, exactly)
    with opened_video(source) as container:
        return _sampled(container, geometry, _decoder(container, source))


def _says_enough(container: Any) -> bool:
    """Whether opening the file without decoding told all but the kind of pixels."""
    stream = container.streams.video[0]
    return "mp4" in container.format.name and _is_h264(stream) and bool(stream.average_rate)


def _sampled(container: Any, geometry: VideoGeometry, decode: _Decode) -> SampledFile:
    info = scan_video(container)
    times = sample_part(info, geometry)
    stream = container.streams.video[0]
    container.seek(_pts(0.0, info, stream), stream=stream, backward=True)
    size_hw = (geometry.crop_px, geometry.crop_px)
    return SampledFile(info, times, _frames_at(times.file_s, decode, info, size_hw))


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
    with opened_video(source) as container:
        return _frames_at(times_s, _decoder(container, source), info, size_hw)


def _frames_at(
    times_s: Sequence[float], decode: _Decode, info: VideoInfo, size_hw: tuple[int, int] | None
) -> Frame:
    indices = [info.frame_at(t) for t in times_s]
    wanted = sorted(set(indices))
    frames: dict[int, Frame] = {}
    try:
        for index, frame in zip(wanted, decode(wanted, info), strict=True):
            frames[index] = resize_bilinear(frame, size_hw) if size_hw else frame
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        raise InvalidMedia(
            f"the video has a frame that cannot be decoded ({type(error).__name__}); "
            "send a complete file"
        ) from error
    return np.stack([frames[i] for i in indices])


def _decoder(container: Any, source: Source) -> _Decode:
    stream = container.streams.video[0]
    is_common = _is_h264(stream) and stream.codec_context.pix_fmt in _8_BITS
    if is_common or not _has_torchcodec():
        return partial(_decode_pyav, container)
    return partial(_decode_torchcodec, source)


def _has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401 - may be installed without a usable ffmpeg
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _decode_torchcodec(source: Source, indices: Sequence[int], _: VideoInfo) -> Iterator[Frame]:
    from torchcodec.decoders import VideoDecoder

    opened: Any = source if isinstance(source, bytes) else str(source)
    decoder = VideoDecoder(opened, dimension_order="NHWC", seek_mode="exact")
    for begin in range(0, len(indices), _FRAMES_AT_ONCE):
        portion = list(indices[begin : begin + _FRAMES_AT_ONCE])
        yield from decoder.get_frames_at(indices=portion).data.numpy()


def _decode_pyav(
    container: Any, indices: Sequence[int], info: VideoInfo, *, is_exact: bool = False
) -> Iterator[Frame]:
    """Decode the frames with ascending `indices` of a file at its begin; seeks over long gaps.

    With `is_exact` raises ValueError for a frame of another time, or not of 8 bits.
    """
    stream = container.streams.video[0]
    wanted = [_pts(info.frame_times_s[index], info, stream) for index in indices]
    reached = _pts(0.0, info, stream)
    decoded = _decoded(container, stream, set(wanted))
    for pts in wanted:
        if (pts - reached) * stream.time_base > _SEEK_FROM_S:
            container.seek(pts, stream=stream, backward=True)
            decoded = _decoded(container, stream, set(wanted))
        frame = next(f for f in decoded if f.pts is not None and f.pts >= pts)
        if is_exact and (frame.pts != pts or frame.format.name not in _8_BITS):
            raise ValueError(f"got a frame of {frame.format.name} at {frame.pts}, not {pts}")
        yield _upright(frame)
        reached = pts


def _pts(time_s: float, info: VideoInfo, stream: Any) -> int:
    """Seconds from the first frame in the file's own clock."""
    return round((time_s + info.begin_s) / stream.time_base)


def _decoded(container: Any, stream: Any, wanted: set[int]) -> Iterator[Any]:
    """Frames from here on; of H.264 without those that are neither wanted nor needed for others.

    Other codecs mark such frames for one layer of time only, in which a wanted one may need them.
    """
    context = stream.codec_context
    can_skip = _is_h264(stream)
    for packet in container.demux(stream):
        if can_skip:
            is_needed = packet.pts is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


def _is_h264(stream: Any) -> bool:
    return bool(stream.codec_context.name == "h264")


def _upright(frame: Any) -> Frame:
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=frame.rotation // 90))
