"""Looks at one file in a process of its own: `python -m molmo_server.media.probe KIND WHAT …`.

Reads the file from standard input and writes JSON: of a video the fields of `VideoInfo`, of a
picture its size and type, of a part of a picture the PNG, or `{"error": …}`. Before anything is
parsed it limits its own memory and processor time, so that a hostile file costs no more than that.
Of a video it decodes the first frame: a file whose packets are there but cannot be decoded is found
here and not in the engine.

Knows: containers, codecs, canvas and duration that are allowed. Does not know: the service.
"""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from molmo_core.errors import InvalidMedia

ALLOWED_CODECS = frozenset(["h264", "hevc", "vp8", "vp9", "av1"])
_ALLOWED_FORMATS = frozenset(["mp4", "mov", "webm", "matroska"])
_MP4_BOXES = frozenset([b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"])
_EBML = b"\x1aE\xdf\xa3"


@dataclass(frozen=True, kw_only=True)
class ChildLimits:
    """What a look may cost."""

    memory_bytes: int
    cpu_s: int


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    max_duration_s: float
    max_side_px: int
    max_frames: int


def container_type(data: bytes) -> str | None:
    """The media type of a file that begins as mp4, mov, webm or mkv do; None for any other.

    Nothing else reaches a demuxer: some formats (playlists, concatenations) name other files.
    """
    if data[4:8] in _MP4_BOXES:
        return "video/mp4"
    return "video/webm" if data[:4] == _EBML else None


def main(arguments: list[str]) -> None:
    """`KIND WHAT COSTS LIMITS`: picture, part or video, its name in messages, JSON of limits."""
    kind, what, costs_json, limits_json = arguments
    costs, limits = ChildLimits(**json.loads(costs_json)), json.loads(limits_json)
    resource.setrlimit(resource.RLIMIT_AS, (costs.memory_bytes, costs.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (costs.cpu_s, costs.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread of it would reserve memory
    data = sys.stdin.buffer.read()
    try:
        if kind == "picture":
            answer = look_at_picture(data, what, limits)
        elif kind == "part":
            answer = part_of_picture(data, what, limits)
        else:
            answer = look_at(data, VideoLimits(**limits))
    except InvalidMedia as error:
        answer = {"error": error.message}
    except MemoryError:
        answer = {"error": f"{what} needs more memory than is allowed; send a smaller one"}
    sys.stdout.write(json.dumps(answer))


def look_at_picture(data: bytes, what: str, canvas: dict[str, Any]) -> dict[str, Any]:
    """Raises InvalidMedia."""
    from molmo_server.media.pictures import Canvas, measure_picture  # under the limits

    size_hw, mime = measure_picture(data, what, Canvas(**canvas))
    return {"size_hw": size_hw, "mime": mime}


def part_of_picture(data: bytes, what: str, limits: dict[str, Any]) -> dict[str, Any]:
    """`limits`: those of the canvas, and the `box`. Raises InvalidMedia."""
    from molmo_server.media.pictures import Canvas, cut_out  # under the limits

    left, top, right, bottom = limits.pop("box")
    part = cut_out(data, what, Canvas(**limits), (left, top, right, bottom))
    return {"png": base64.b64encode(part).decode()}


def look_at(data: bytes, limits: VideoLimits) -> dict[str, Any]:
    """Fields of VideoInfo; raises InvalidMedia."""
    from molmo_core.videos import probe_video  # under the limits, like all that parses

    rotation_deg = _check_streams(data, limits)
    info = probe_video(data)
    if rotation_deg % 180:
        info = replace(info, width_px=info.height_px, height_px=info.width_px)
    if info.duration_s > limits.max_duration_s:
        raise InvalidMedia(
            f"the video lasts {info.duration_s:.1f} s, allowed are {limits.max_duration_s:g} s; "
            "send a shorter part"
        )
    return asdict(info)


def _check_streams(data: bytes, limits: VideoLimits) -> int:
    """How far frames are turned to be displayed, in degrees."""
    import av

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not _ALLOWED_FORMATS.intersection(container.format.name.split(",")):
                raise InvalidMedia(
                    f"the video's container is {container.format.name}; send mp4, mov, webm or mkv"
                )
            if not container.streams.video:
                raise InvalidMedia(
                    "the file has no video stream; send a video (mp4, mov, webm or mkv)"
                )
            codec = container.streams.video[0].codec_context  # None: nothing can decode it
            names = {codec.name, codec.codec.canonical_name} if codec else {"unknown"}
            if not names & ALLOWED_CODECS:
                raise InvalidMedia(
                    f"the video's codec is {codec.name if codec else 'unknown'}; allowed are "
                    f"{', '.join(sorted(ALLOWED_CODECS))}: convert it with ffmpeg"
                )
            if max(codec.width, codec.height) > limits.max_side_px:
                raise InvalidMedia(
                    f"the video is {codec.width}x{codec.height} pixels, allowed are "
                    f"{limits.max_side_px} a side; scale it down"
                )
            return _first_rotation(container, limits)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InvalidMedia(
            f"the video cannot be decoded ({type(error).__name__}); "
            "send a complete mp4, mov, webm or mkv file"
        ) from error


def _first_rotation(container: Any, limits: VideoLimits) -> int:
    """Of the first frame that can be decoded; counts packets, which headers may not tell."""
    frame = None
    for n_packets, packet in enumerate(container.demux(video=0)):
        if n_packets > limits.max_frames:
            raise InvalidMedia(
                f"the video has more than {limits.max_frames:,} frames; send a shorter part, or "
                "fewer frames a second"
            )
        if frame is None:
            frame = next(iter(packet.decode()), None)
    if frame is None:
        raise InvalidMedia("the video has no frames; send a file with at least one frame")
    return int(frame.rotation)


if __name__ == "__main__":
    main(sys.argv[1:])
