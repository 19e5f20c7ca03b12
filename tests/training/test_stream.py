"""The same batches on any number of ranks and workers, and after any stop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_core.errors import DataError
from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.lanes import DrawnRows, ReadyRow, SizedRow, StreamConfig
from molmo_training.data.mixture import Group, Part
from molmo_training.data.packing import Budgets, Size
from molmo_training.data.scenes import image_example
from molmo_training.data.stream import PackedStream, merge_states
from molmo_training.data.tokenize import Tokenizing
from tests.support.tiny_runs import tiny_trainer

MIXTURE = Group(
    name="all",
    parts=(Part(dataset="small"), Part(dataset="large", loss_factor=0.5)),
)
CONFIG = StreamConfig(
    mixture=MIXTURE, budgets=Budgets(n_tokens=60, n_crops=6), n_lanes=12, buffer_size=5, seed=3
)
PATCHES = 4


@dataclass(frozen=True)
class Drawn:
    """Rows of random size whose first token names the dataset and the index."""

    name: int
    size: int
    fails: Callable[[int], bool] = lambda index: False

    def __len__(self) -> int:
        return self.size

    def make(self, index: int, rng: np.random.Generator) -> SizedRow:
        if self.fails(index):
            raise OSError(f"picture {index} is cut off")
        n_tokens, n_crops = int(rng.integers(4, 40)), int(rng.integers(0, 4))
        ids = rng.integers(1000, size=n_tokens)
        ids[0] = 10_000 * self.name + index
        n_visual = min(n_crops, n_tokens)
        row = Tokenized(
            input_ids=ids,
            targets=np.roll(ids, -1),
            weights=np.ones(n_tokens, dtype=np.float32),
            position_ids=np.arange(n_tokens),
            subsegments=np.zeros(n_tokens, dtype=np.int64),
            crops=rng.integers(256, size=(n_crops, PATCHES, 3), dtype=np.uint8),
            pooling=np.arange(n_visual)[:, None] * PATCHES,
            patch_targets=np.zeros((n_crops, PATCHES, 8), dtype=np.float32),
            token_targets=np.zeros((n_visual, 8), dtype=np.float32),
            about=np.zeros(n_tokens, dtype=np.int64),
            shows=np.zeros(n_tokens, dtype=np.int64),
        )
        return ReadyRow(row)


SOURCES = {"small": Drawn(1, 20), "large": Drawn(2, 500)}


def stream(config: StreamConfig = CONFIG, **options: Any) -> PackedStream:
    return PackedStream(config, options.pop("sources", SOURCES), **options)


def packs_of(world_size: int, n_packs: int, state: Any = None, **options: Any) -> list[Batch]:
    """The packs of a run with so many ranks, in their order."""
    ranks = [
        iter(stream(rank=rank, world_size=world_size, state=state, **options))
        for rank in range(world_size)
    ]
    return [next(ranks[number % world_size]) for number in range(n_packs)]


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for field in fields(Batch):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), field.name
            else:
                assert one == other, field.name


@pytest.fixture(scope="module")
def whole() -> list[Batch]:
    return packs_of(1, 72)


def test_batches_are_packed_within_their_budgets(whole: list[Batch]) -> None:
    for batch in whole:
        assert 0 < batch.input_ids.shape[1] <= 60
        assert batch.crops.shape[0] <= 6
        assert int(batch.subsegments.max()) // 100_000 + 1 == batch.n_examples
    assert sum(batch.n_examples for batch in whole) / len(whole) > 2


def test_no_example_comes_twice_in_an_epoch(whole: list[Batch]) -> None:
    """What is not in a pack waits in a buffer: 12 lanes of 5."""
    names: list[int] = []
    for batch in whole:
        starts = batch.position_ids[0] == 0
        names += batch.input_ids[0][starts].tolist()
    of_large = [name for name in names if name >= 20_000]
    assert len(of_large) == len(set(of_large))
    of_small = np.bincount([name - 10_000 for name in names if name < 20_000], minlength=20)
    assert of_small.min() >= 1


def test_loss_factors_of_the_mixture_multiply_weights(whole: list[Batch]) -> None:
    for batch in whole:
        starts = torch.nonzero(batch.position_ids[0] == 0).flatten().tolist()
        for start in starts:
            expected = 0.5 if batch.input_ids[0, start] >= 20_000 else 1.0
            assert batch.weights[0, start] == expected


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_share_the_same_packs(whole: list[Batch], world_size: int) -> None:
    assert_equal(packs_of(world_size, 72), whole)


def test_a_run_goes_on_at_any_batch(whole: list[Batch]) -> None:
    first = stream()
    batches = iter(first)
    for n_taken in range(1, 40):
        next(batches)
        saved = json.loads(json.dumps(first.state()))
        if n_taken % 3 == 0:
            assert_equal(list(islice(stream(state=saved), 15)), whole[n_taken : n_taken + 15])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (6, 1), (3, 2)])
def test_a_run_goes_on_with_other_ranks(whole: list[Batch], before: int, after: int) -> None:
    ranks = [stream(rank=rank, world_size=before) for rank in range(before)]
    for rank in ranks:
        list(islice(rank, 36 // before))
    state = json.loads(json.dumps(merge_states(rank.state() for rank in ranks)))
    assert len(json.dumps(state)) < 4000
    assert_equal(packs_of(after, 36, state), whole[36:])


@pytest.mark.parametrize("n_workers", [1, 5])
def test_worker_processes_change_nothing(whole: list[Batch], n_workers: int) -> None:
    """Real processes, before the stop and, in another number, after it; two ranks."""
    ranks = [stream(rank=rank, world_size=2, n_workers=n_workers) for rank in range(2)]
    halves = [list(islice(rank, 7)) for rank in ranks]
    assert_equal([batch for pair in zip(*halves, strict=True) for batch in pair], whole[:14])
    state = merge_states(rank.state() for rank in ranks)
    assert_equal(list(islice(stream(state=state, n_workers=6 - n_workers), 20)), whole[14:34])


def test_rows_of_a_batch_are_packs_in_their_order(whole: list[Batch]) -> None:
    config = replace(CONFIG, rows_per_batch=3)
    two = [islice(stream(config, rank=rank, world_size=2), 4) for rank in range(2)]
    for turn, (even, odd) in enumerate(zip(*two, strict=True)):
        for row in range(6):
            batch, k = (even, odd)[row % 2], row // 2
            pack = whole[6 * turn + row]
            assert torch.equal(batch.input_ids[k][batch.valid[k]], pack.input_ids[0])
        assert even.n_examples == sum(whole[6 * turn + row].n_examples for row in (0, 2, 4))
    n_crops = sum(whole[number].crops.shape[0] for number in (0, 2, 4))
    first = next(iter(stream(config, world_size=2)))
    assert first.crops.shape[0] == n_crops


def test_bad_examples_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    sources = SOURCES | {"large": Drawn(2, 500, fails=lambda index: index % 40 == 0)}
    tolerant = replace(CONFIG, bad_share_allowed=0.2)
    ours = stream(tolerant, sources=sources)
    taken = list(islice(ours, 48))
    named = [record.getMessage() for record in caplog.records]
    n_bad = sum(lane["n_bad"] for lane in ours.state()["lanes"].values())
    assert len(named) == n_bad > 0
    first = next(message for message in named if "large[" in message)
    assert "left out: large[" in first
    assert "in epoch 0: OSError: picture" in first
    ids = torch.cat([b.input_ids[0][b.position_ids[0] == 0] for b in taken])
    assert not [i for i in ids.tolist() if i >= 20_000 and (i - 20_000) % 40 == 0]
    assert_equal(packs_of(4, 48, config=tolerant, sources=sources), taken)


def test_more_bad_examples_than_allowed_end_the_run() -> None:
    broken = {"small": Drawn(1, 20), "large": Drawn(2, 500, fails=lambda index: True)}
    for n_workers in (0, 1):
        with pytest.raises(DataError, match=r"11 of the \d+ examples of lane 0 .* large\[\d+\]"):
            list(islice(stream(sources=broken, n_workers=n_workers), 48))


def test_an_example_larger_than_a_pack_is_a_bad_one(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, budgets=Budgets(n_tokens=38, n_crops=6), bad_share_allowed=0.5)
    list(islice(stream(config), 48))
    assert "39 tokens and" in caplog.text
    assert "a pack holds 38 tokens" in caplog.text


@dataclass(frozen=True)
class Late:
    """Knows sizes beforehand; some of its rows fail or change when they are read."""

    rows: Drawn
    opened: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, index: int, rng: np.random.Generator) -> SizedRow:
        return LateRow(self, index, self.rows.make(index, rng))


@dataclass(frozen=True)
class LateRow:
    source: Late
    index: int
    inner: SizedRow

    @property
    def size(self) -> Size:
        return self.inner.size

    def row(self) -> Tokenized:
        self.source.opened.append(self.index)
        if self.index % 40 == 0:
            raise OSError("the video ends too early")
        return self.inner.row()


def test_media_are_opened_when_they_are_packed(caplog: pytest.LogCaptureFixture) -> None:
    """A row that fails then is left out of its pack, and the buffer holds no pixels."""
    late = Late(Drawn(2, 500), [])
    config = replace(CONFIG, mixture=Group(name="all", parts=(Part(dataset="late"),)), n_lanes=1)
    ours = stream(replace(config, bad_share_allowed=0.2), sources={"late": late})
    batches = list(islice(ours, 60))
    lane = ours.state()["lanes"]["0"]
    assert len(late.opened) == lane["n_drawn"] - len(lane["waiting"])
    assert len(late.opened) == sum(b.n_examples for b in batches) + lane["n_bad"]
    assert "the video ends too early" in caplog.text


def test_a_trainer_learns_from_a_pack_of_drawn_scenes(
    tmp_path: Path, tokenizing: Tokenizing
) -> None:
    sources = {"scenes": DrawnRows(draw=image_example, tokenizing=tokenizing, n_examples=100)}
    config = StreamConfig(
        mixture=Group(name="all", parts=(Part(dataset="scenes"),)),
        budgets=Budgets(n_tokens=700, n_crops=4),
        n_lanes=2,
        buffer_size=4,
    )
    trainer = tiny_trainer(tmp_path)
    batch = next(iter(PackedStream(config, sources)))
    assert batch.n_examples > 1
    losses = [trainer.advance([batch])["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_start_up_reads_nothing() -> None:
    class Unread(Drawn):
        def make(self, index: int, rng: np.random.Generator) -> SizedRow:
            raise AssertionError("read")

    iter(stream(sources={"small": Unread(1, 20), "large": Unread(2, 500)}))
    state = stream().state()
    assert stream(sources={"small": Unread(1, 20), "large": Unread(2, 500)}, state=state)


def changed_states() -> Iterator[tuple[Callable[[], PackedStream], str]]:
    state = stream().state()
    half = stream(world_size=2).state()
    taken = stream()
    next(iter(taken))
    odd = taken.state()
    yield lambda: stream(replace(CONFIG, seed=4), state=state), "seed 3, the run has 4"
    yield lambda: stream(replace(CONFIG, buffer_size=6), state=state), "buffer_size 5"
    other: Mapping[str, Drawn] = SOURCES | {"large": Drawn(2, 501)}
    yield lambda: stream(sources=other, state=state), "made with mixture"
    yield lambda: stream(state=half), r"nothing of lanes \[1, 3, 5"
    yield lambda: stream(state=odd, world_size=2), "after 1 packs; 2 ranks"
    uneven = [stream(rank=rank, world_size=2) for rank in range(2)]
    list(islice(uneven[1], 2))
    of_two = merge_states(rank.state() for rank in uneven)
    yield lambda: stream(state=of_two), "lane 0 has given 0 packs where the others make it 1"
    yield lambda: stream(rank=2, world_size=2), "rank is 2 of 2"
    yield lambda: stream(world_size=5), "n_lanes is 12; 5 ranks with 1 rows"
    unknown = Group(name="all", parts=(Part(dataset="smal"),))
    yield lambda: stream(replace(CONFIG, mixture=unknown)), "no dataset smal; near are small"


def test_what_does_not_fit_together_is_refused() -> None:
    for make, message in changed_states():
        with pytest.raises(DataError, match=message):
            make()


def test_data_that_changed_since_the_stop_are_bad_examples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = stream()
    list(islice(ours, 24))

    class Changed(Drawn):
        def make(self, index: int, rng: np.random.Generator) -> SizedRow:
            rng.random()
            return super().make(index, rng)

    sources = {"small": Drawn(1, 20), "large": Changed(2, 500)}
    tolerant = replace(CONFIG, bad_share_allowed=1.0)
    list(islice(stream(tolerant, sources=sources, state=ours.state()), 12))
    assert re.search(r"large\[\d+\] .* it has \d+ tokens .* had \d+ and \d when", caplog.text)
