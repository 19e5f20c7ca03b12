"""Times drafted answers: two engines with molmo2-tiny, one of them drafting, asked in turn."""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from molmo_core.clips import sample_clip, write_clip
from molmo_core.prompts import Turn, Verb, verb_prompt
from molmo_core.scenes import draw_scene, sample_scene
from tests.bench.processes import Row
from tests.support.checkpoint import TINY
from tests.support.conversations import Conversation
from tests.support.engine import RunningEngine, Wanted, engines_side_by_side

_FIRST_SEED = 4_000_000_000  # no clip of training or evaluation
_PASSES = (
    ("tracks", "tracks of new clips, one at a time", 1),
    ("tracks", "again, one at a time", 1),
    ("tracks", "8 at a time", 8),
    ("tracks", "16 at a time", 16),
    ("points", "points of new pictures, one at a time", 1),
    ("points", "again, 8 at a time", 8),
    ("captions", "captions, one at a time", 1),
)


def draw_tracks(n_clips: int, folder: Path) -> Iterator[Conversation]:
    """A question about each clip: one object by name, or all shapes."""
    for number in range(n_clips):
        clip = sample_clip(np.random.default_rng(_FIRST_SEED + number))
        path = folder / f"{number}.mp4"
        write_clip(clip, path)
        named = f"the {clip.objects[0].colour} {clip.objects[0].shape}"
        text = verb_prompt("track", named if number % 3 else "the shapes", has_video=True)
        turns = (Turn(role="user", text=text),)
        yield Conversation(name=path.stem, turns=turns, video=path.read_bytes())


def draw_pictures(verb: Verb, n_pictures: int) -> Iterator[Conversation]:
    for number in range(n_pictures):
        scene = sample_scene(np.random.default_rng(_FIRST_SEED + number), n_objects=4)
        png = io.BytesIO()
        Image.fromarray(draw_scene(scene)).save(png, "PNG")
        turns = (Turn(role="user", text=verb_prompt(verb, "the shapes", n_images=1)),)
        yield Conversation(name=f"{verb}-{number}", turns=turns, images=(png.getvalue(),))


def answer(engine: RunningEngine, asked: Conversation) -> tuple[int, ...]:
    body = engine.chat(asked.messages(), max_tokens=1024, return_token_ids=True)
    return tuple(body["choices"][0]["token_ids"])


def counters(engine: RunningEngine) -> Counter[str]:
    """Of vLLM: drafts, drafted and accepted tokens since the start."""
    found = re.findall(
        r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total\S* (\S+)",
        engine.client.get("/metrics").text,
        re.MULTILINE,
    )
    return Counter({name: int(float(value)) for name, value in found})


def compare(
    engines: dict[str, RunningEngine], asked: list[Conversation], at_once: int
) -> tuple[dict[str, float], bool]:
    """Tokens a second of each engine, and whether all answers are equal."""
    seconds = dict.fromkeys(engines, 0.0)
    answers: dict[str, list[tuple[int, ...]]] = {name: [] for name in engines}
    for k in range(0, len(asked), at_once):
        turn = list(engines) if k // at_once % 2 else list(engines)[::-1]
        for name in turn:
            began = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                answers[name] += pool.map(partial(answer, engines[name]), asked[k : k + at_once])
            seconds[name] += time.perf_counter() - began
    n_tokens = sum(map(len, answers["plain"]))
    rates = {name: n_tokens / seconds[name] for name in engines}
    return rates, answers["plain"] == answers["drafting"]


def rows(n_clips: int = 32) -> Iterator[Row]:
    """Starts two engines; raises RuntimeError when answers differ."""
    wanted = {
        name: Wanted(checkpoint=TINY, fields={"drafts": drafts, "max_num_seqs": 16})
        for name, drafts in (("plain", "off"), ("drafting", "on"))
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = {
            "tracks": list(draw_tracks(n_clips, folder)),
            "points": list(draw_pictures("point", n_clips)),
            "captions": list(draw_pictures("caption", n_clips)),
        }
        with engines_side_by_side(wanted, folder) as engines:
            for kind, what, at_once in _PASSES:
                before = counters(engines["drafting"])
                rates, are_equal = compare(engines, asked[kind], at_once)
                if not are_equal:
                    raise RuntimeError(f"{what}: the answers differ")
                new = counters(engines["drafting"]) - before
                per_step = 1 + new["accepted_tokens"] / max(new["drafts"], 1)
                yield f"{what}: tokens a step, all answers equal", per_step, ""
                both = f"times, {rates['plain']:.0f} and {rates['drafting']:.0f} tokens/s"
                yield "  drafting against plain", rates["drafting"] / rates["plain"], both
