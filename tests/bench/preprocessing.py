"""Image and video preparation beside the plain algorithm, on one core; values must be equal.

Both sides get the same encoded file and give the same tensors; rounds alternate. Knows: files to
prepare, the clock. Does not know: the algorithms (`plain`, `molmo_core`, `molmo_hf`).
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from molmo_core.images import ImageGeometry, prepare_image
from molmo_core.videos import VideoGeometry, prepare_frames
from molmo_hf.image_processing_molmo2 import rgb_pixels
from molmo_hf.video_io import sample_file
from tests.bench.plain import Plain, plain_image, plain_video
from tests.bench.processes import Row

IMAGE_SIZES = ((640, 480), (1280, 720), (1920, 1080))
N_ROUNDS = 7


def rows() -> Iterator[Row]:
    """For each file the time of either side and how many times faster ours is."""
    with one_core():
        yield from _bench_images()
        yield from _bench_videos()


def _bench_images() -> Iterator[Row]:
    for width, height in IMAGE_SIZES:
        file = _picture(width, height)
        # A picture is decoded the same way by both, by Pillow: only what follows is compared.
        pixels = rgb_pixels(file)
        yield from _compared(
            f"picture of {width} × {height}",
            lambda pixels=pixels: plain_image(pixels),
            lambda pixels=pixels: ours_image(pixels),
        )


def _bench_videos() -> Iterator[Row]:
    for width, height in ((320, 240), (640, 360), (1280, 720)):
        file = drawn_video(width, height, n_frames=150)
        yield from _compared(
            f"video of 5 s, {width} × {height}, from the file",
            lambda file=file: plain_video(file),
            lambda file=file: ours_video(file),
            n_rounds=3,
        )


def ours_image(pixels: NDArray[np.uint8]) -> Plain:
    prepared = prepare_image(pixels, ImageGeometry())
    return Plain(prepared.crops, prepared.pooling)


def ours_video(file: bytes) -> Plain:
    geometry = VideoGeometry()
    prepared = prepare_frames(sample_file(file, geometry).frames, geometry)
    return Plain(prepared.crops, prepared.pooling)


def _compared(
    what: str, plain: Callable[[], Plain], ours: Callable[[], Plain], *, n_rounds: int = N_ROUNDS
) -> Iterator[Row]:
    assert_equal(plain(), ours())
    taken_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(n_rounds):
        for work, times in zip((plain, ours), taken_s, strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    plain_s, ours_s = map(statistics.median, taken_s)
    yield f"prepare a {what}: plain numpy", plain_s * 1e3, "ms"
    yield f"prepare a {what}: ours", ours_s * 1e3, "ms"
    yield f"prepare a {what}: plain / ours", plain_s / ours_s, "×"


def assert_equal(plain: Plain, ours: Plain) -> None:
    np.testing.assert_array_equal(ours.pooling, plain.pooling)
    np.testing.assert_array_equal(ours.crops, plain.crops)


@contextmanager
def one_core() -> Iterator[None]:
    """This thread and the decoders' that it starts stay on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_canvas(width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _canvas(width: int, height: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def drawn_video(width: int, height: int, n_frames: int) -> bytes:
    """H.264 as x264 makes it by itself: a background that moves, a square before it."""
    background = _canvas(width, height)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(n_frames):
            pixels = np.roll(background, k, axis=1)
            left = 4 * k % (width - 80)
            pixels[80:160, left : left + 80] = (250, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
