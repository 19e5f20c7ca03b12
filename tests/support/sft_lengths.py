"""Sizes of examples drawn like those of the SFT mixture: tokens and crops.

Shares of the groups, tokens and crops of pictures and frames, limits on frames and clips are those
of the project's specification of Molmo2's training (mixture `molmo2`, tilings with 8 and 24 crops,
81 tokens and about 5 of time a frame, 2 frames a second, at most 128). The specification does not
say how long videos and answers are: `VIDEOS` and the ranges of text below are assumptions, chosen
so that a pack holds about 4 examples.
"""

from __future__ import annotations

import numpy as np

from molmo_training.data.packing import Budgets, Size

SFT = Budgets(n_tokens=16_384, n_crops=128)
LONG_CONTEXT = Budgets(n_tokens=36_864, n_crops=384)
SHARES = {
    "demo": 0.15,
    "video_academic": 0.20,
    "image_academic": 0.25,
    "tracking": 0.15,
    "video_pointing": 0.15,
    "image_pointing": 0.10,
    "nlp": 0.10,
}
# Tokens and crops of pictures of usual sizes with at most 8 tiles, how often each; with 24.
PICTURES = ((410, 2), (752, 5), (992, 7), (1189, 9), (980, 6), (1334, 9))
PICTURE_RATES = (0.10, 0.25, 0.15, 0.30, 0.10, 0.10)
LARGE_PICTURES = ((2006, 17), (1949, 16), (2804, 25), (2823, 25))
LARGE_RATE = 0.3
TOKENS_A_FRAME = 86
# Median and spread (of the logarithm) of a video's seconds, the longest, tokens of text.
VIDEOS = {
    "demo": (40, 0.8, np.inf, (100, 900)),
    "video_academic": (25, 1.1, np.inf, (20, 400)),
    "tracking": (12, 0.8, 64, (50, 2500)),
    "video_pointing": (25, 0.8, 63, (40, 900)),
}
DEMO_PICTURE_RATE, DEMO_PICTURES_RATE = 0.5, 0.15


def sft_sizes(n: int, *, seed: int = 0, most_frames: int = 128) -> list[Size]:
    rng = np.random.default_rng(seed)
    rates = np.array(list(SHARES.values()))
    groups = rng.choice(list(SHARES), size=n, p=rates / rates.sum())
    return [_size(str(group), rng, most_frames) for group in groups]


def _size(group: str, rng: np.random.Generator, most_frames: int) -> Size:
    if group == "nlp":
        return Size(int(np.clip(rng.lognormal(np.log(400), 1.0), 30, 4096)), 0)
    kind = rng.random()
    if group == "demo" and kind < DEMO_PICTURES_RATE:
        return _pictures(int(rng.integers(2, 6)), rng)
    if group == "demo" and kind < DEMO_PICTURES_RATE + DEMO_PICTURE_RATE:
        return _pictures(1, rng)
    if group == "image_academic":
        return _pictures(1, rng)
    if group == "image_pointing":
        if kind < LARGE_RATE:
            n_tokens, n_crops = LARGE_PICTURES[rng.integers(len(LARGE_PICTURES))]
            return Size(n_tokens + int(rng.integers(30, 600)), n_crops)
        return _pictures(1, rng)
    median_s, spread, longest_s, text = VIDEOS[group]
    seconds = min(rng.lognormal(np.log(median_s), spread), longest_s)
    n_frames = int(min(most_frames, 2 * seconds + 2))
    return Size(n_frames * TOKENS_A_FRAME + int(rng.integers(*text)), n_frames)


def _pictures(n: int, rng: np.random.Generator) -> Size:
    chosen = [PICTURES[k] for k in rng.choice(len(PICTURES), size=n, p=PICTURE_RATES)]
    n_tokens, n_crops = map(sum, zip(*chosen, strict=True))
    return Size(n_tokens + int(rng.integers(30, 600)), n_crops)
