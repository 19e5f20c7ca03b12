"""Packs are the best ones, nothing is lost, and examples of a pack do not see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_training.data.example import Batch, Tokenized
from molmo_training.data.loader import collate
from molmo_training.data.packing import Budgets, Packer, Size, best_subset, pack_rows
from molmo_training.data.scenes import image_example, multi_image_example, video_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.loss import LossConfig, token_loss
from molmo_training.recipes.tiny import VIDEOS
from molmo_training.trainer import Trainer
from tests.bench.packing import efficiency, our_packs
from tests.bench.plain_packing import plain_knapsack
from tests.support.sft_lengths import LONG_CONTEXT, SFT, sft_sizes
from tests.support.tiny_runs import tiny_trainer

BUDGETS = Budgets(n_tokens=40, n_crops=9)
SIZES = st.builds(Size, st.integers(1, 40), st.integers(0, 9))


def blank_row(n_tokens: int, n_crops: int, pooling: list[list[int]]) -> Tokenized:
    n_visual = len(pooling)
    width = len(pooling[0]) if pooling else 4
    return Tokenized(
        input_ids=np.arange(n_tokens),
        targets=np.arange(n_tokens),
        weights=np.linspace(0, 1, n_tokens, dtype=np.float32),
        position_ids=np.arange(n_tokens),
        subsegments=np.zeros(n_tokens, dtype=np.int64),
        crops=np.zeros((n_crops, 729, 3), dtype=np.uint8),
        pooling=np.array(pooling, dtype=np.int64).reshape(n_visual, width),
        patch_targets=np.zeros((n_crops, 729, 8), dtype=np.float32),
        token_targets=np.zeros((n_visual, 8), dtype=np.float32),
        about=np.zeros(n_tokens, dtype=np.int64),
        shows=np.zeros(n_tokens, dtype=np.int64),
    )


def test_a_pack_is_joined_as_in_the_reference() -> None:
    """Golden: appendix A.5 of the specification."""
    own = [[0, 1, 27, 28], [2, -1, 29, -1], [700, 701, 727, 728]]
    rows = [blank_row(3, 1, own), blank_row(2, 0, []), blank_row(2, 2, own)]
    packed = pack_rows(rows)
    assert packed.subsegments.tolist() == [0, 0, 0, 100_000, 100_000, 200_000, 200_000]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1]
    shifted = [[729, 730, 756, 757], [731, -1, 758, -1], [1429, 1430, 1456, 1457]]
    assert packed.pooling.tolist() == own + shifted
    assert packed.weights.tolist() == np.concatenate([row.weights for row in rows]).tolist()
    assert packed.crops.shape == (3, 729, 3)


def test_images_beside_video_have_pooling_of_the_same_width() -> None:
    image, video = blank_row(3, 1, [[0, 1, 27, 28]]), blank_row(3, 1, [[*range(9)]])
    pooling = pack_rows([image, video]).pooling
    assert pooling.tolist() == [[0, 1, 27, 28, *[-1] * 5], [*range(729, 738)]]
    assert collate([image, video]).pooling.tolist() == pooling.tolist()


def test_the_plain_table_finds_the_reference_subset() -> None:
    """Golden: appendix A.5 of the specification; what ours is compared with below is right."""
    sizes = [(5, 1), (4, 3), (3, 0), (2, 2)]
    assert plain_knapsack(sizes, [50, 70, 30, 20], (8, 4)) == [1, 2]


def worth(sizes: list[Size], chosen: list[int]) -> int:
    taken = [sizes[k] for k in chosen]
    n_tokens, n_crops = sum(s.n_tokens for s in taken), sum(s.n_crops for s in taken)
    assert n_tokens <= BUDGETS.n_tokens
    assert n_crops <= BUDGETS.n_crops
    return n_tokens * BUDGETS.n_crops + n_crops * BUDGETS.n_tokens


@given(st.lists(SIZES, min_size=1, max_size=14))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_a_subset_is_worth_as_much_as_the_best(sizes: list[Size]) -> None:
    chosen = best_subset(sizes, BUDGETS)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    left = (BUDGETS.n_tokens - sizes[0].n_tokens, BUDGETS.n_crops - sizes[0].n_crops)
    values = [float(worth([size], [0])) for size in sizes[1:]]
    best = [0, *(k + 1 for k in plain_knapsack(sizes[1:], values, left))]
    assert worth(sizes, chosen) == worth(sizes, best)


@given(st.lists(SIZES, max_size=60), st.integers(1, 12))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_nothing_is_lost_and_nobody_waits_for_ever(sizes: list[Size], buffer_size: int) -> None:
    packer: Packer[int] = Packer(BUDGETS, buffer_size)
    packs, joined_before_pack = [], {}
    for number, size in enumerate(sizes):
        if packer.is_full:
            packs.append(packer.pop())
        packer.add(size, number)
        joined_before_pack[number] = len(packs)
    while packer.waiting:
        packs.append(packer.pop())
    assert sorted(n for pack in packs for _, n in pack) == list(range(len(sizes)))
    for index, pack in enumerate(packs):
        worth([size for size, _ in pack], list(range(len(pack))))
        assert all(index - joined_before_pack[n] < buffer_size for _, n in pack)
        assert all(sizes[n] == size for size, n in pack)


def test_what_no_pack_can_hold_is_refused() -> None:
    packer: Packer[None] = Packer(BUDGETS)
    with pytest.raises(ValueError, match="41 tokens and 0 crops; a pack holds 40 tokens and 9"):
        packer.add(Size(41, 0), None)
    with pytest.raises(ValueError, match="0 tokens"):
        packer.add(Size(0, 0), None)
    with pytest.raises(ValueError, match="at least 1"):
        Packer(BUDGETS, buffer_size=0)


@pytest.mark.parametrize("budgets", [SFT, LONG_CONTEXT])
def test_packs_of_the_sft_mixture_are_full(budgets: Budgets) -> None:
    packs = our_packs(sft_sizes(2000, most_frames=budgets.n_crops), budgets)
    assert efficiency(packs, budgets) >= 0.97


@pytest.fixture(scope="module")
def examples(tokenizing: Tokenizing) -> list[Tokenized]:
    rng = np.random.default_rng(3)
    made = [image_example(rng), multi_image_example(rng), image_example(rng, n_branches=1)]
    return [tokenizing(example) for example in [*made, video_example(rng, VIDEOS)]]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder: Path = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(folder)
    trainer.model.eval()
    return trainer


def losses_of(trainer: Trainer, batch: Batch) -> list[torch.Tensor]:
    """Of the tokens, and of each lesson."""
    decoded = trainer.forward(batch)
    head = trainer.model.lm_head.weight
    sums = token_loss(decoded.hidden, head, decoded.targets, decoded.weights, LossConfig())
    lessons = trainer.lessons
    assert lessons is not None
    taught = lessons(decoded, batch, 0.0).values()
    return [sums.total / sums.weight, *(lesson.loss for lesson in taught)]


def test_packed_is_unpacked(trainer: Trainer, examples: list[Tokenized]) -> None:
    """Every loss of the trainer and every gradient, in single precision."""
    packs = [pack_rows(examples[:2]), pack_rows(examples[2:])]
    outcomes = []
    for rows in (examples, packs, [pack_rows(examples)]):
        trainer.model.zero_grad()
        losses = losses_of(trainer, collate(rows))
        torch.stack(losses).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
        outcomes.append(([loss.item() for loss in losses], gradients))
    (losses_alone, gradients_alone), *others = outcomes
    assert min(losses_alone) > 1
    for losses_packed, gradients_packed in others:
        assert losses_packed == pytest.approx(losses_alone, abs=1e-5)
        for name, gradient in gradients_alone.items():
            torch.testing.assert_close(
                gradients_packed[name], gradient, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m
            )


def test_an_example_does_not_feel_its_neighbours(
    trainer: Trainer, examples: list[Tokenized]
) -> None:
    """Other pixels and positions before it and another example behind it change nothing in it."""

    def hidden(rows: list[Tokenized]) -> torch.Tensor:
        with torch.no_grad():
            return trainer.forward(collate([pack_rows(rows)])).hidden

    first, middle, last = examples[:3]
    before, length = len(first.input_ids), len(middle.input_ids)
    plain = hidden([first, middle, last])[before : before + length]
    other = replace(first, crops=255 - first.crops, position_ids=first.position_ids + 3)
    changed = hidden([other, middle, examples[3]])
    torch.testing.assert_close(changed[before : before + length], plain, atol=1e-5, rtol=0)
    assert (changed[:before] - hidden([first])).abs().max() > 0.1


def test_a_pack_of_text_alone_needs_no_crops(trainer: Trainer, examples: list[Tokenized]) -> None:
    def text(row: Tokenized) -> Tokenized:
        kept = row.subsegments != row.subsegments[0]  # what is shared is the media
        words = {
            name: getattr(row, name)[kept]
            for name in "input_ids targets weights position_ids subsegments about shows".split()
        }
        media = {name: getattr(row, name)[:0] for name in "crops pooling patch_targets".split()}
        return replace(row, **words, **media, token_targets=row.token_targets[:0])

    batch = collate([pack_rows([text(row) for row in examples[:2]])])
    assert batch.crops.shape[0] == 0
    hidden = trainer.forward(batch).hidden
    hidden.sum().backward()
    assert hidden.isfinite().all()
    tower = trainer.model.model.vision_backbone.image_vit
    assert tower.patch_embedding.weight.grad is not None


def test_rows_of_different_lengths_cost_no_crops(examples: list[Tokenized]) -> None:
    packs = [pack_rows(examples[:3]), pack_rows(examples[3:])]
    n_crops = sum(len(row.crops) for row in examples)
    assert collate(packs).crops.shape[0] == n_crops
