"""200 changes of weights under load, gateway and real engine: nothing dropped, nothing mixed.

Two checkpoints of random weights; every answer must be that of the one it names, as a server that
was started on it gives it. Prints what a change costs.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import httpx2
import orjson
import pytest

from molmo_core.checkpoints import FolderStore
from molmo_core.prompts import Turn
from molmo_server.settings import MolmoSettings
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.checkpoints.publish import compute_probes
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import Conversation, draw_image, draw_text, draw_video
from tests.support.gateway import events_of, serve_own_engines

N_SWAPS = 200
N_CALLERS = 6
KEY = "soak"
START_LIMIT_S = 500
PROMPTS = (
    Conversation(name="text", turns=(Turn(role="user", text=draw_text(1, 9)),)),
    Conversation(
        name="image",
        turns=(Turn(role="user", text=draw_text(2, 5)),),
        images=(draw_image(200, 120, 2),),
    ),
    Conversation(
        name="images",
        turns=(Turn(role="user", text=draw_text(3, 5)),),
        images=(draw_image(90, 140, 3), draw_image(120, 90, 4)),
    ),
    Conversation(
        name="video",
        turns=(Turn(role="user", text=draw_text(4, 5)),),
        video=draw_video(Fraction(25), 40, 5, (160, 120)),
    ),
)


@dataclass(kw_only=True)
class Answer:
    prompt: str
    checkpoint: str
    text: str
    began: float
    took_s: float


@dataclass
class Load:
    url: str
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        callers = [threading.Thread(target=self._call, args=(k,)) for k in range(N_CALLERS)]
        for caller in callers:
            caller.start()
        try:
            yield
        finally:
            self.is_over.set()
            for caller in callers:
                caller.join(timeout=120)
            assert not any(caller.is_alive() for caller in callers), "a request hangs"

    def _call(self, number: int) -> None:
        rng = random.Random(number)
        with httpx2.Client(base_url=self.url, timeout=120) as http:
            while not self.is_over.is_set():
                try:
                    self.answers.append(
                        ask(http, rng.choice(PROMPTS), is_stream=rng.random() < 0.5)
                    )
                except (AssertionError, httpx2.HTTPError, KeyError) as error:
                    self.failures.append(repr(error))


def ask(http: httpx2.Client, prompt: Conversation, *, is_stream: bool) -> Answer:
    body = {"messages": prompt.messages(), "max_tokens": 12, "temperature": 0, "stream": is_stream}
    began = time.monotonic()
    response = http.post("/v1/chat/completions", json=body)
    took_s = time.monotonic() - began
    assert response.status_code == 200, response.text
    if is_stream:
        events = events_of(response.content)
        assert not any("error" in event for event in events)
        pieces = [c["delta"].get("content") or "" for e in events for c in e["choices"]]
        # vLLM names the weights with the last chunk of an answer only.
        text, named = "".join(pieces), {e.get("system_fingerprint") for e in events} - {None}
    else:
        content = orjson.loads(response.content)
        text = content["choices"][0]["message"]["content"]
        named = {content["system_fingerprint"]}
    named.add(response.headers["x-molmo-checkpoint"])
    (checkpoint,) = named  # header and chunks agree
    return Answer(prompt=prompt.name, checkpoint=checkpoint, text=text, began=began, took_s=took_s)


@dataclass(frozen=True)
class Published:
    store: FolderStore
    ids: tuple[str, str]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("store")
    store = FolderStore(folder)
    ids = []
    for seed in (0, 1):
        with store.staging() as staged:
            model = write_checkpoint(staged / "model", "qwen3", seed=seed)
            manifest = store.publish(
                model,
                name=f"seed{seed}",
                source="random weights",
                code_version="soak",
                created=time.time(),
                bidirectional="all",
                probes=compute_probes(open_checkpoint(model)),
            )
        ids.append(manifest.id)
    return Published(store, (ids[0], ids[1]))


@contextmanager
def serving(published: Published, folder: Path) -> Iterator[tuple[str, float]]:
    """A gateway and its engine on the store's current checkpoint; URL and seconds of the start."""
    settings = MolmoSettings(
        store=str(published.store.folder),
        cache_dir=folder / "cache",
        admin_key=KEY,
        follows_store=False,
        dtype="float32",
        n_threads=1,
        max_concurrent=N_CALLERS + 1,
        start_timeout_s=START_LIMIT_S,
        probe_tolerance=1e-3,
    )
    began = time.monotonic()
    with serve_own_engines(settings, folder) as (url, _):
        yield url, time.monotonic() - began


def answers_of_one(url: str) -> dict[str, str]:
    with httpx2.Client(base_url=url, timeout=120) as http:
        for _ in range(2):  # the second time from the caches
            answers = {p.name: ask(http, p, is_stream=False).text for p in PROMPTS}
    return answers


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_swaps_under_load(
    published: Published, tmp_path: Path, show: Callable[..., None]
) -> None:
    first, second = published.ids
    (tmp_path / "b").mkdir()
    with serving(published, tmp_path / "b") as (url, start_s):
        expected = {second: answers_of_one(url)}
    published.store.set_current(first)
    (tmp_path / "a").mkdir()
    with serving(published, tmp_path / "a") as (url, _):
        expected[first] = answers_of_one(url)
        assert all(expected[first][p.name] != expected[second][p.name] for p in PROMPTS)
        load, swaps = Load(url), []
        with load.running(), httpx2.Client(base_url=url, timeout=120) as admin:
            time.sleep(5)
            for number in range(N_SWAPS):
                wanted = (second, first)[number % 2]
                began = time.monotonic()
                response = admin.post(
                    f"/admin/checkpoints/{wanted}/activate",
                    headers={"authorization": f"Bearer {KEY}"},
                )
                swaps.append((began, time.monotonic()))
                assert response.status_code == 200, response.text
                with_new = ask(admin, PROMPTS[number % len(PROMPTS)], is_stream=False)
                assert with_new.checkpoint == wanted
                time.sleep(0.3)
        assert answers_of_one(url) == expected[first]
    assert load.failures == []
    for answer in load.answers:
        assert answer.text == expected[answer.checkpoint][answer.prompt]
    show(*report(load, swaps, start_s))
    took_s = [end - began for began, end in swaps]
    assert statistics.median(took_s) < start_s / 20


def report(load: Load, swaps: list[tuple[float, float]], start_s: float) -> tuple[str, ...]:
    during, apart = [], []
    for answer in load.answers:
        end = answer.began + answer.took_s
        touched = any(answer.began < b and end > a for a, b in swaps)
        (during if touched else apart).append(answer.took_s)
    took_s = sorted(end - began for began, end in swaps)
    by_id = Counter(answer.checkpoint for answer in load.answers)
    base, swap_s = statistics.median(apart), statistics.median(took_s)
    return (
        f"{len(swaps)} swaps, answers {dict(by_id)}, 0 failed or hung",
        f"swap: median {swap_s:.3f} s, worst {took_s[-1]:.3f} s; start of an engine "
        f"{start_s:.1f} s, {start_s / swap_s:.0f} times as long",
        f"answer: median {base:.3f} s apart from swaps, {statistics.median(during):.3f} s with one",
        f"added: median {statistics.median(during) - base:.3f} s, worst {max(during) - base:.3f} s",
    )
