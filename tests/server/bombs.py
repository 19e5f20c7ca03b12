"""Files that cost whoever opens them more than they weigh."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from tests.server.media import png_bomb

SIDE_PX = 7000
"""Squared just under the most pixels that are taken: such a picture is decoded."""
_ONE_COLOUR = "071011118888fe07"


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _png(*chunks: bytes, side_px: int = SIDE_PX, colour: int = 6, bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", side_px, side_px, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IEND", b"")


def _pixels(bytes_per_pixel: int, side_px: int = SIDE_PX) -> bytes:
    return _chunk(b"IDAT", _deflated(side_px * (1 + side_px * bytes_per_pixel)))


def _deflated(n_bytes: int) -> bytes:
    """`n_bytes` zeros, without compressing each of them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = packer.compress(bytes(n_bytes & 0xFFFFF)) + packer.flush()
    checksum = (n_bytes % 65_521) << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + block * (n_bytes >> 20) + last + struct.pack(">I", checksum)


def animated_png(n_frames: int = 200) -> bytes:
    """The first picture is as large as can be, and each of the others as well."""

    def control(number: int) -> bytes:
        where = struct.pack(">IIIII", number, SIDE_PX, SIDE_PX, 0, 0)
        return _chunk(b"fcTL", where + struct.pack(">HHBB", 1, 10, 1, 1))

    first = _pixels(4)
    data = first[8:-4]
    later = [
        control(2 * k + 1) + _chunk(b"fdAT", struct.pack(">I", 2 * k + 2) + data) for k in range(3)
    ]
    counts = _chunk(b"acTL", struct.pack(">II", n_frames, 0))
    return _png(counts, control(0), first, *later)


def png_with_long_text() -> bytes:
    packed = _deflated(200 << 20)
    return _png(
        _chunk(b"zTXt", b"Comment\0\0" + packed),
        _chunk(b"iCCP", b"profile\0\0" + packed),
        _pixels(4, 8),
        side_px=8,
    )


def packed_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8000, 8000)).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    return gzip.compress(buffer.getvalue())


def tiff() -> bytes:
    return gzip.decompress(packed_tiff())


def long_gif(n_frames: int = 20_000) -> bytes:
    """Small frames without end behind a first one that is as large as can be."""
    buffer = io.BytesIO()
    Image.new("L", (SIDE_PX, SIDE_PX)).save(buffer, "GIF")
    whole = buffer.getvalue()[:-1]
    dot = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return whole + dot * n_frames + b";"


def _saved(kind: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (SIDE_PX, SIDE_PX)).save(buffer, kind, **options)
    return buffer.getvalue()


def _riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _lossless(side_px: int = SIDE_PX) -> bytes:
    """A lossless picture of one colour: five prefix codes of one symbol each, and no bits more."""
    sizes = (side_px - 1) | (side_px - 1) << 14 | 1 << 28
    return _riff(b"VP8L", b"\x2f" + struct.pack("<I", sizes) + bytes.fromhex(_ONE_COLOUR))


def webp() -> bytes:
    content = b"WEBP" + _lossless()
    return _riff(b"RIFF", content)


def animated_webp(n_frames: int = 100) -> bytes:
    side = struct.pack("<I", SIDE_PX - 1)[:3]
    frame = _riff(b"ANMF", bytes(6) + side + side + b"\x0a\0\0\0" + _lossless())
    extended = _riff(b"VP8X", b"\x12\0\0\0" + side + side)
    return _riff(b"RIFF", b"WEBP" + extended + _riff(b"ANIM", bytes(6)) + frame * n_frames)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved("JPEG", "L", exif=exif, quality=1, progressive=True)


PICTURES: dict[str, Callable[[], bytes]] = {
    "png of 50,000 x 50,000": lambda: png_bomb(50_000),
    "png of 7,000 x 7,000 with alpha": lambda: _png(_pixels(4)),
    "png of 7,000 x 7,000 with 16 bits": lambda: _png(_pixels(8), bits=16),
    "animated png": animated_png,
    "png with 200 MB of text": png_with_long_text,
    "packed tiff": packed_tiff,
    "tiff": tiff,
    "gif of 20,000 frames": long_gif,
    "webp of 7,000 x 7,000": webp,
    "animated webp of 7,000 x 7,000": animated_webp,
    "turned progressive jpeg of 7,000 x 7,000": turned_jpeg,
}


def _packets(width_px: int, height_px: int, n_frames: int) -> Iterator[av.Packet]:
    """Of H.264 that tells its size in every key frame."""
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt = width_px, height_px, "yuv420p"
    codec.time_base = Fraction(1, 25)
    codec.options = {"x264-params": "repeat-headers=1:bframes=0", "preset": "ultrafast"}
    for k in range(n_frames):
        pixels = np.full((height_px, width_px, 3), 9 * k % 256, dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = k
        yield from codec.encode(frame)
    yield from codec.encode(None)


def changing_video() -> bytes:
    """Ten frames of 64 x 32, then ten of 1920 x 1080 in the same stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        at = 0
        for size in ((64, 32), (1920, 1080)):
            for packet in _packets(*size, 10):
                packet.stream, packet.pts, packet.dts = stream, at, at
                packet.time_base = Fraction(1, 25)
                file.mux(packet)
                at += 1
    return buffer.getvalue()


def many_frames(n_frames: int = 150_000) -> bytes:
    """Frames of a few bytes, two thousand of them a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=2000)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        first, *_ = _packets(64, 32, 1)
        content = bytes(first)
        for k in range(n_frames):
            packet = av.Packet(content if k == 0 else b"\0\0\0\1\x09\x10")
            packet.stream, packet.pts, packet.dts = stream, k, k
            packet.time_base, packet.is_keyframe = Fraction(1, 2000), k == 0
            file.mux(packet)
    return buffer.getvalue()


def lying_video(n_frames: int = 1_000_000) -> bytes:
    """A short file whose table of sizes says that there are a million frames in it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for packet in _packets(64, 32, 3):
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            file.mux(packet)
    data = bytearray(buffer.getvalue())
    for name, at in ((b"stsz", 12), (b"stts", 12), (b"mvhd", 20)):
        place = data.index(name) + at
        data[place : place + 4] = struct.pack(">I", n_frames)
    return bytes(data)


VIDEOS: dict[str, Callable[[], bytes]] = {
    "video that changes its size": changing_video,
    "video of 150,000 frames": many_frames,
    "video that says it has a million frames": lying_video,
}
