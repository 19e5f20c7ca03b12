"""Times the parser and the preparation of pictures; prints one table.

Figures of one run are to be compared with each other only: machines differ and are noisy.
Run: make bench
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from molmo_core.images import ImageGeometry, count_image_tokens, prepare_image
from molmo_core.points import GroundingParser, TrackFrame, render_tracks

Row = tuple[str, float, str]


def median_s(work: Callable[[], object], *, n: int) -> float:
    """Median wall-clock time of `n` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def bench_parser() -> Iterator[Row]:
    """A track of 4 objects in 128 frames, fed as an engine streams it: four characters a time."""
    for n_frames in (64, 128, 256):
        frames = [
            TrackFrame(time_s=k / 2, points={o: (0.1 * o, k / 600) for o in range(4)})
            for k in range(n_frames)
        ]
        text = render_tracks(frames, "ball")
        pieces = [text[k : k + 4] for k in range(0, len(text), 4)]

        def parse(pieces: list[str] = pieces) -> None:
            parser = GroundingParser(media="video", n_media=1)
            for piece in pieces:
                parser.feed(piece)
            parser.close()

        took = median_s(parse, n=9)
        yield f"parse a track of {len(text):,} characters, streamed", took * 1e3, "ms"


def bench_pixels() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    geometry = ImageGeometry()
    for width, height in ((640, 480), (1920, 1080)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        took = median_s(lambda pixels=pixels: prepare_image(pixels, geometry), n=5)
        yield f"tile and patch a picture of {width} × {height}", took * 1e3, "ms"
    took = median_s(lambda: count_image_tokens((1080, 1920), geometry), n=99)
    yield "count the tokens of 1920 × 1080", took * 1e6, "µs"


def main() -> int:
    for bench in (bench_parser, bench_pixels):
        for what, figure, unit in bench():
            sys.stdout.write(f"{what:64s} {figure:10.2f} {unit}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
