"""Decoded frames: once each, within the budget, also when asked for at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from molmo_server.engine.video_loader import DecodedClip, FrameCache, TimedVideoLoader
from tests.server.engine.test_video_loader import SETTINGS
from tests.server.media import video


class Decoding:
    """Counts; clips have 10 bytes."""

    def __init__(self) -> None:
        self.cache, self.made = FrameCache(), []

    def get(self, key: str, budget_bytes: int = 25) -> DecodedClip:
        return self.cache.get(key, lambda: self._make(key), budget_bytes=budget_bytes)

    def _make(self, key: str) -> DecodedClip:
        self.made.append(key)
        return DecodedClip(np.zeros(10, np.uint8), {"key": key})


def test_a_known_clip_is_not_decoded_again():
    decoding = Decoding()
    assert decoding.get("a") is decoding.get("a")
    assert decoding.made == ["a"]


def test_the_least_recently_used_goes():
    decoding = Decoding()
    for key in ("a", "b", "a", "c", "a", "b"):
        decoding.get(key)
    assert decoding.made == ["a", "b", "c", "b"]
    assert decoding.cache.n_bytes == 20


def test_without_a_budget_nothing_is_kept():
    decoding = Decoding()
    assert decoding.get("a", 0).metadata == {"key": "a"}
    decoding.get("a", 9)
    assert decoding.made == ["a", "a"]
    assert decoding.cache.n_bytes == 0


def test_who_asks_meanwhile_waits_for_the_same_clip():
    decoding = Decoding()
    is_asked, may_end = threading.Event(), threading.Event()

    def slow() -> DecodedClip:
        is_asked.set()
        assert may_end.wait(10)
        return decoding._make("a")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(decoding.cache.get, "a", slow, budget_bytes=25)
        assert is_asked.wait(10)
        others = [pool.submit(decoding.get, "a") for _ in range(2)]
        may_end.set()
        assert {id(clip.result()) for clip in [first, *others]} == {id(first.result())}
    assert decoding.made == ["a"]


def test_a_failure_is_not_remembered():
    decoding = Decoding()

    def fail() -> DecodedClip:
        raise ValueError("no video")

    with pytest.raises(ValueError, match="no video"):
        decoding.cache.get("a", fail, budget_bytes=25)
    assert decoding.get("a").metadata == {"key": "a"}


def test_the_loader_keeps_options_and_tenants_apart():
    file, settings = video(n_frames=60), {**SETTINGS, "frame_cache_bytes": 10**9}
    shapes = [
        TimedVideoLoader.load_bytes(file, **{**settings, **asked})[0].shape[0]
        for asked in ({}, {"asked_fps": 5.0}, {"num_frames": 2}, {"end_s": 1.0}, {})
    ]
    assert shapes == [6, 13, 2, 3, 6]
    first, metadata = TimedVideoLoader.load_bytes(file, **settings)
    metadata["fps"] = 0
    again, told = TimedVideoLoader.load_bytes(file, **settings)
    assert again is first
    assert told["fps"] == 25
    assert not first.flags.writeable
    other, _ = TimedVideoLoader.load_bytes(file, **settings, tenant="b")
    assert other is not first
    np.testing.assert_array_equal(other, first)
