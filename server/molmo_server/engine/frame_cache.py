"""Decoded frames that are remembered within a budget of bytes; the least recently used go first.

vLLM hashes a medium after it was decoded, so its own caches spare a second question about a video
everything but the decoding. Used by the threads that load media: whoever asks for what another one
is just decoding waits for that.

Knows: sizes, use. Does not know: files, geometry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class DecodedClip(NamedTuple):
    frames: NDArray[np.uint8]
    """(T, side, side, 3), shared: nobody may write into them."""
    metadata: dict[str, Any]


class FrameCache:
    def __init__(self) -> None:
        self._lock = Lock()
        self._clips: OrderedDict[Hashable, Future[DecodedClip]] = OrderedDict()
        """Also those that are being decoded; only decoded ones count and go."""
        self.n_bytes = 0

    def get(
        self, key: Hashable, decode: Callable[[], DecodedClip], *, budget_bytes: int
    ) -> DecodedClip:
        """The clip of `key`; `decode` makes it where it is not there, and what it raises is raised
        for everybody who waits for it."""
        mine: Future[DecodedClip] | None = None
        with self._lock:
            known = self._clips.get(key)
            if known is None:
                known = mine = self._clips[key] = Future()
            self._clips.move_to_end(key)
        if mine is None:
            return known.result()
        try:
            clip = decode()
        except BaseException as error:
            with self._lock:
                del self._clips[key]
            mine.set_exception(error)
            raise
        mine.set_result(clip)
        with self._lock:
            self.n_bytes += clip.frames.nbytes
            self._make_room(budget_bytes)
        return clip

    def _make_room(self, budget_bytes: int) -> None:
        decoded = [key for key, clip in self._clips.items() if clip.done()]
        for key in decoded:
            if self.n_bytes <= budget_bytes:
                break
            self.n_bytes -= self._clips.pop(key).result().frames.nbytes
