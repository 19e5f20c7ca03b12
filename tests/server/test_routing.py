"""Which of several engines is asked, and how far one that breaks is still trusted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_server.engine_pool.breaker import Breaker, Trust
from molmo_server.engine_pool.routing import choose, ranked


@dataclass
class Engine:
    name: str
    n_in_flight: int = 0
    is_avoided: bool = False


def engines(n: int) -> list[Engine]:
    return [Engine(f"engine-{k}") for k in range(n)]


MEDIA = [f"{k:064x}" for k in range(3000)]


def test_media_are_spread_evenly_and_always_the_same_way() -> None:
    of_three = engines(3)
    first = [choose(of_three, medium).name for medium in MEDIA]
    assert first == [choose(of_three[::-1], medium).name for medium in MEDIA]
    assert set(Counter(first)) == {"engine-0", "engine-1", "engine-2"}
    assert all(900 < count < 1100 for count in Counter(first).values())


def test_only_the_media_of_an_engine_that_leaves_change_place() -> None:
    of_three = engines(3)
    before = {medium: choose(of_three, medium).name for medium in MEDIA}
    after = {medium: choose(of_three[:2], medium).name for medium in MEDIA}
    moved = [medium for medium in MEDIA if before[medium] != after[medium]]
    assert moved == [medium for medium in MEDIA if before[medium] == "engine-2"]
    assert {after[medium] for medium in moved} == {"engine-0", "engine-1"}


def test_whoever_has_too_much_passes_on_to_the_next_in_the_order() -> None:
    of_three = engines(3)
    order = ranked(of_three, MEDIA[0])
    asked = []
    for _ in range(12):  # nothing is answered meanwhile
        engine = choose(of_three, MEDIA[0])
        engine.n_in_flight += 1
        asked.append(engine.name)
    assert asked[0] == order[0].name
    counts = Counter(asked)
    assert [counts[engine.name] for engine in order] == [6, 6, 0]  # 1.5 times the mean


def test_without_a_medium_whoever_has_least_to_do_is_asked() -> None:
    of_three = engines(3)
    of_three[0].n_in_flight = of_three[1].n_in_flight = 1
    assert choose(of_three, "").name == "engine-2"


def test_who_is_avoided_is_asked_when_no_other_is_there() -> None:
    one, other = engines(2)
    preferred = ranked([one, other], MEDIA[0])[0]
    preferred.is_avoided = True
    assert choose([one, other], MEDIA[0]) is not preferred
    assert choose([one, other], "") is not preferred
    assert choose([preferred], MEDIA[0]) is preferred


@settings(derandomize=True)
@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), medium=st.text(max_size=8))
def test_nobody_gets_far_more_than_the_others(loads: list[int], medium: str) -> None:
    several = [Engine(f"e{k}", load) for k, load in enumerate(loads)]
    chosen = choose(several, medium)
    assert chosen.n_in_flight + 1 <= 1.5 * (sum(loads) + 1) / len(loads) + 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_failures_in_a_row_open_the_breaker_for_longer_each_time() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    pauses = []
    for _ in range(2):
        breaker.fail()
        assert breaker.trust is Trust.CLOSED
    for _ in range(7):
        breaker.fail()
        assert breaker.trust is Trust.OPEN
        began = clock.now
        while breaker.trust is Trust.OPEN:
            clock.now += 0.5
        assert breaker.trust is Trust.HALF_OPEN
        pauses.append(clock.now - began)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    breaker.succeed()
    assert breaker.trust is Trust.CLOSED


@pytest.mark.parametrize("n_failures", [1, 2])
def test_an_answer_between_failures_keeps_it_closed(n_failures: int) -> None:
    breaker = Breaker(Clock())
    for _ in range(5):
        for _ in range(n_failures):
            breaker.fail()
        breaker.succeed()
    assert breaker.trust is Trust.CLOSED
