"""Small pictures and videos as data URLs, whole and broken."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import av
import numpy as np
from PIL import Image


def picture(
    width_px: int = 64, height_px: int = 48, kind: str = "PNG", *, orientation: int | None = None
) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    rng = np.random.default_rng(width_px * height_px)
    pixels = rng.integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def video(n_frames: int = 50, rate: int = 25, codec: str = "libx264") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "24"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for k in range(n_frames):
            pixels = np.full((32, 64, 3), 4 * k % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def png_bomb(side_px: int) -> bytes:
    """A PNG of a few kilobytes whose header promises `side_px` squared pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(4096)))
        + chunk(b"IEND", b"")
    )


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def video_part(data: bytes) -> dict[str, object]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def text_part(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}
