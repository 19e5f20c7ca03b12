"""The scheduler's rules, over a stand-in for vLLM's scheduler that grants what a test says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from molmo_server.engine.scheduling import KeepsVisualRegionWhole

NOTHING = ([], 0, 99, [], [])


class StockScheduler:
    """Answers as set; notes what it was asked."""

    def __init__(self):
        self.n_granted = None
        self.hit = ("blocks", 0, 0, False)
        self.added, self.freed = [], []
        self.encoder_cache_manager = SimpleNamespace(free=self.freed.append)
        self.cache_config = SimpleNamespace(cache_dtype="auto")
        self.kv_cache_manager = SimpleNamespace(empty_kv_cache_blocks="no blocks")

    def add_request(self, request):
        self.added.append(request)

    def _get_local_prefix_cache_hit(self, request):
        return self.hit

    def _try_schedule_encoder_inputs(self, request, n_computed, n_new, budget, shift):
        granted = n_new if self.n_granted is None else self.n_granted
        return [0, 1], granted, budget - 10, [], []


class Scheduler(KeepsVisualRegionWhole, StockScheduler):
    pass


class Request:
    """Two images: tokens 1 to 10 and 14 to 19, then text."""

    def __init__(self, media=(("a", 1, 10), ("b", 14, 6)), salt=None):
        self.mm_features = [
            SimpleNamespace(
                identifier=name,
                mm_position=SimpleNamespace(
                    offset=at,
                    length=n,
                    extract_embeds_range=lambda at=at, n=n: [(at, at + n - 1)],
                ),
            )
            for name, at, n in media
        ]
        self.cache_salt = salt
        self.prompt_token_ids = list(range(40))
        self.block_hashes = ["stale"]

    def update_block_hashes(self):
        self.block_hashes.append(f"hashed with {self.cache_salt}")


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.mark.parametrize("n_new", [1, 12, 19])
def test_a_budget_that_ends_inside_the_region_schedules_nothing(scheduler, n_new):
    assert scheduler._try_schedule_encoder_inputs(Request(), 0, n_new, 99) == NOTHING
    assert scheduler.freed == []


@pytest.mark.parametrize("n_new", [20, 21, 500])
def test_the_whole_region_is_scheduled_and_its_text_tail_may_be_cut(scheduler, n_new):
    scheduled = scheduler._try_schedule_encoder_inputs(Request(), 0, n_new, 99)
    assert scheduled == ([0, 1], n_new, 89, [], [])


def test_an_image_that_does_not_fit_the_encoder_gives_the_others_back(scheduler):
    scheduler.n_granted = 14  # as when the second image must wait
    request = Request()
    assert scheduler._try_schedule_encoder_inputs(request, 0, 40, 99) == NOTHING
    assert scheduler.freed == [request]


@pytest.mark.parametrize("n_computed", [20, 33])
def test_behind_the_region_everything_is_free(scheduler, n_computed):
    scheduled = scheduler._try_schedule_encoder_inputs(Request(), n_computed, 3, 99)
    assert scheduled[1] == 3


@pytest.mark.parametrize(
    ("n_cached", "kept"), [(0, True), (8, False), (16, False), (19, False), (20, True), (24, True)]
)
def test_a_hit_inside_the_region_is_dropped_where_the_cache_cannot_be_read(
    scheduler, n_cached, kept
):
    scheduler.cache_config.cache_dtype = "fp8"
    scheduler.hit = ("blocks", n_cached, n_cached, False)
    expected = scheduler.hit if kept else ("no blocks", 0, 0, False)
    assert scheduler._get_local_prefix_cache_hit(Request()) == expected


def test_a_hit_inside_the_region_is_kept_and_the_rest_comes_in_one_step(scheduler):
    scheduler.hit = ("blocks", 16, 0, False)
    assert scheduler._get_local_prefix_cache_hit(Request()) == scheduler.hit
    assert scheduler._try_schedule_encoder_inputs(Request(), 16, 3, 99) == NOTHING
    assert scheduler._try_schedule_encoder_inputs(Request(), 16, 4, 99)[1] == 4


def test_text_only_requests_are_left_alone(scheduler):
    request = Request(media=())
    scheduler.hit = ("blocks", 8, 0, False)
    scheduler.add_request(request)
    assert scheduler.added == [request]
    assert request.block_hashes == ["stale"]
    assert request.cache_salt is None
    assert scheduler._get_local_prefix_cache_hit(request)[1] == 8
    assert scheduler._try_schedule_encoder_inputs(request, 0, 5, 99)[1] == 5


def test_hashes_are_salted_with_the_whole_region_and_the_callers_salt(scheduler):
    media = [("a", 1, 10)], [("a", 1, 10), ("b", 14, 6)], [("b", 1, 10), ("a", 14, 6)]
    requests = [*(Request(m) for m in media), Request(media[0], salt="tenant")]
    for request in requests:
        scheduler.add_request(request)
    assert len({r.cache_salt for r in requests}) == 4
    assert requests[3].cache_salt.startswith("tenant|")
    for request in requests:
        assert request.block_hashes == [f"hashed with {request.cache_salt}"]
    again = Request(media[1])
    scheduler.add_request(again)
    assert again.cache_salt == requests[1].cache_salt
