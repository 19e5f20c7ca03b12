"""Decode chosen frames of a video file, and only those.

PyAV for the common kind of file, of which it decodes less; torchcodec where it loads, PyAV
otherwise, for all others. Both take the frame that is displayed at a time, by presentation order,
turn it as the file's display matrix says, and give the same bytes. Knows: codecs. Does not know:
which times to choose (`molmo_core.videos`), prompts. Imported by nothing an export carries.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from molmo_core.errors import InvalidMedia
from molmo_core.images import resize_bilinear
from molmo_core.videos import VideoInfo, probe_video

Source = bytes | str | PathLike[str]
Frame = NDArray[np.uint8]

_FRAMES_AT_ONCE = 16
_8_BITS = frozenset(f"yuv{j}{sampling}p" for j in ("", "j") for sampling in (420, 422, 444))
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
    frames: dict[int, Frame] = {}
    try:
        for index, frame in zip(wanted, _decode(source, wanted, info), strict=True):
            frames[index] = resize_bilinear(frame, size_hw) if size_hw else frame
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        raise InvalidMedia(
            f"the video has a frame that cannot be decoded ({type(error).__name__}); "
            "send a complete file"
        ) from error
    return np.stack([frames[i] for i in indices])


def _decode(source: Source, indices: Sequence[int], info: VideoInfo) -> Iterator[Frame]:
    with _opened(source) as container:
        if _is_common(container.streams.video[0].codec_context) or not _has_torchcodec():
            yield from _decode_opened(container, indices, info)
            return
    yield from _decode_torchcodec(source, indices)


def _has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401 - may be installed without a usable ffmpeg
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _decode_torchcodec(source: Source, indices: Sequence[int]) -> Iterator[Frame]:
    from torchcodec.decoders import VideoDecoder

    opened: Any = source if isinstance(source, bytes) else str(source)
    decoder = VideoDecoder(opened, dimension_order="NHWC", seek_mode="exact")
    for begin in range(0, len(indices), _FRAMES_AT_ONCE):
        portion = list(indices[begin : begin + _FRAMES_AT_ONCE])
        yield from decoder.get_frames_at(indices=portion).data.numpy()


def decode_pyav(source: Source, indices: Sequence[int], info: VideoInfo) -> Iterator[Frame]:
    """Decode the frames with ascending `indices`; seeks over long gaps."""
    with _opened(source) as container:
        yield from _decode_opened(container, indices, info)


def _decode_opened(container: Any, indices: Sequence[int], info: VideoInfo) -> Iterator[Frame]:
    stream = container.streams.video[0]
    base = stream.time_base
    assert base is not None  # probe_video read times with it
    wanted = [round((info.frame_times_s[index] + info.begin_s) / base) for index in indices]
    reached = round(info.begin_s / base)
    decoded = _decoded(container, stream, set(wanted))
    for pts in wanted:
        if (pts - reached) * base > _SEEK_FROM_S:
            container.seek(pts, stream=stream, backward=True)
            decoded = _decoded(container, stream, set(wanted))
        yield _upright(next(f for f in decoded if f.pts is not None and f.pts >= pts))
        reached = pts


def _decoded(container: Any, stream: Any, wanted: set[int]) -> Iterator[Any]:
    """Frames from here on; of H.264 without those that are neither wanted nor needed for others.

    Other codecs mark such frames for one layer of time only, in which a wanted one may need them.
    """
    context = stream.codec_context
    can_skip = _is_common(context)
    for packet in container.demux(stream):
        if can_skip:
            is_needed = packet.pts is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


def _is_common(context: Any) -> bool:
    """H.264 in 8 bits. Of 10 bits PyAV and torchcodec give other colours: torchcodec's hold."""
    return context.name == "h264" and context.pix_fmt in _8_BITS


def _opened(source: Source) -> Any:
    return av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), mode="r")


def _upright(frame: Any) -> Frame:
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=frame.rotation // 90))
