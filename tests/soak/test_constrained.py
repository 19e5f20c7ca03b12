"""Answers decoded under a grammar, by models that would write anything, and by one that was taught.

Every verb answer must parse without a warning; what the taught model says must not get worse.
Prints shares and the price in time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx2
import pytest

from molmo_server.settings import MolmoSettings
from tests.server.media import data_url
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import draw_image, draw_video
from tests.support.gateway import serve_own_engines

N_PROMPTS = 1000
START_LIMIT_S = 500
IMAGES = [data_url(draw_image(60 + 20 * k, 80, k), "image/png") for k in range(8)]
VIDEOS = [
    data_url(draw_video(Fraction(25), 10 + 15 * k, k, (96, 64)), "video/mp4") for k in range(4)
]

CUT = ("truncated", "unclosed_tag", "count_mismatch")
"""What an answer that was cut may have besides its whole points."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=["random weights", "molmo2-tiny"])
def http(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    folder: Path = tmp_path_factory.mktemp("c")
    checkpoint = None
    if request.param == "random weights":
        checkpoint = write_checkpoint(folder / "model", "qwen3")
    settings = MolmoSettings(
        checkpoint=checkpoint,
        dtype="float32",
        n_threads=1,
        start_timeout_s=START_LIMIT_S,
        deadline_s=300,
    )
    with (
        serve_own_engines(settings, folder) as (url, _),
        httpx2.Client(base_url=url, timeout=300) as http,
    ):
        yield http


def prompt(number: int) -> tuple[str, dict[str, Any]]:
    rng = random.Random(number)
    verb = rng.choice(("point", "count", "track"))
    colour = rng.choice(("red", "blue", "green"))
    wanted = f"{colour} {rng.choice(('circles', 'stars', 'objects'))}"
    if verb == "track" or rng.random() < 0.2:
        media: dict[str, Any] = {"video_url": rng.choice(VIDEOS)}
    else:
        media = {"images": rng.sample(IMAGES, rng.randint(1, 3))}
    return verb, {"object": wanted, "seed": number, "temperature": rng.choice((0, 1.0)), **media}


def ask(http: httpx2.Client, number: int, *, is_constrained: bool) -> tuple[list[str], float]:
    """Codes of the answer's warnings, and seconds."""
    verb, body = prompt(number)
    began = time.monotonic()
    body |= {"constrained": is_constrained, "max_tokens": 120}
    response = http.post(f"/v1/{verb}", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    # The same place twice is what the model says, and no fault of the text.
    codes = [w["code"] for w in answer["warnings"] if w["code"] != "duplicate_point"]
    if answer["finish_reason"] == "length":  # what is whole is kept: that is all there is to ask
        codes = [code for code in codes if code not in CUT]
    if answer["finish_reason"] != "length" and answer["status"] == "unreadable":
        codes.append("neither places nor none")
    if verb == "count" and answer["count"] != len(answer["points"]) and answer["found"]:
        codes.append("another count")
    return codes, time.monotonic() - began


def test_every_answer_parses(
    http: httpx2.Client, request: pytest.FixtureRequest, show: Callable[..., None]
) -> None:
    seconds: dict[bool, float] = {}
    shares: dict[bool, float] = {}
    for is_constrained, n_prompts in ((False, 100), (True, N_PROMPTS)):
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda k, c=is_constrained: ask(http, k, is_constrained=c), range(n_prompts)
                )
            )
        shares[is_constrained] = sum(not codes for codes, _ in answers) / n_prompts
        seconds[is_constrained] = statistics.median(s for _, s in answers[:100])
    name = request.node.callspec.params["http"]
    show(
        f"{name}: without a fault {shares[False]:.3f} free, {shares[True]:.4f} of "
        f"{N_PROMPTS} under the grammar; median {seconds[False]:.2f} s and "
        f"{seconds[True]:.2f} s for the same 100 prompts"
    )
    assert shares[True] == 1.0
