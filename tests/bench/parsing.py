"""The parser of answers: a track of 4 objects in pieces of four characters, as engines send it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from molmo_core.points import GroundingParser, TrackFrame, render_tracks
from tests.bench.processes import Row

_N_ROUNDS = 9


def rows() -> Iterator[Row]:
    for n_frames in (64, 128, 256):
        frames = [
            TrackFrame(time_s=k / 2, points={o: (0.1 * o, k / 600) for o in range(4)})
            for k in range(n_frames)
        ]
        text = render_tracks(frames, "ball")
        pieces = [text[k : k + 4] for k in range(0, len(text), 4)]
        took_s = statistics.median(_parse_s(pieces) for _ in range(_N_ROUNDS))
        yield f"parse a track of {len(text):,} characters, streamed", took_s * 1e3, "ms"


def _parse_s(pieces: list[str]) -> float:
    began = time.perf_counter()
    parser = GroundingParser(media="video", n_media=1)
    for piece in pieces:
        parser.feed(piece)
    parser.close()
    return time.perf_counter() - began
