"""Message trees: what a branch sees, what is learnt, where marked objects fall."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molmo_core.errors import InvalidExample
from molmo_core.images import image_tokens, prepare_image
from molmo_core.prompts import Subtitle, Turn, render_chat
from molmo_core.tokens import IM_PATCH, IMAGE, TURN_END
from molmo_training.data.example import Branch, Example, MarkedObject
from molmo_training.data.marks import mark_patches, pooled_targets, shown_objects
from molmo_training.data.scenes import image_example
from molmo_training.data.tokenize import Tokenizing
from molmo_training.data.tree import PREFIX_SUBSEGMENT, Weighting
from molmo_training.recipes.tiny import IMAGES

PICTURE = np.full((120, 200, 3), 128, dtype=np.uint8)


def branch(question: str, answer: str, weight: float = 1.0) -> Branch:
    turns = (Turn(role="user", text=question), Turn(role="assistant", text=answer))
    return Branch(turns=turns, weight=weight)


def tree(*branches: Branch, **fields: object) -> Example:
    return Example(images=[PICTURE], branches=branches, **fields)


def test_a_row_reads_as_the_chat_of_the_server(tokenizing: Tokenizing) -> None:
    row = tokenizing(tree(branch("Point to stars.", "There are none.")))
    grid = prepare_image(PICTURE, tokenizing.images).grid
    turns = [Turn(role="user", text="Point to stars.")]
    chat = render_chat(turns, n_images=1).replace(
        IMAGE, "".join(image_tokens(grid, tokenizing.images))
    )
    assert row.input_ids.tolist() == tokenizing.encode(TURN_END + chat + "There are none.")


def test_branches_start_where_the_pictures_end_and_do_not_share_a_number(
    tokenizing: Tokenizing,
) -> None:
    row = tokenizing(tree(branch("one?", "1"), branch("a longer question?", "2")))
    shared = row.subsegments == PREFIX_SUBSEGMENT
    n_shared = int(shared.sum())
    assert shared[:n_shared].all()
    assert row.position_ids[:n_shared].tolist() == list(range(n_shared))
    for number in (0, 1):
        positions = row.position_ids[row.subsegments == number]
        assert positions.tolist() == list(range(n_shared, n_shared + len(positions)))


def test_only_answers_are_learnt_with_the_weight_of_their_branch(tokenizing: Tokenizing) -> None:
    row = tokenizing(tree(branch("one?", "11", weight=0.5), branch("two?", "22")))
    encode = tokenizing.encode
    learnt = [row.weights[row.subsegments == k] for k in (0, 1)]
    # Position i predicts i + 1, so an answer of n tokens and its end are n + 1 targets.
    assert [int((w > 0).sum()) for w in learnt] == [len(encode("11")) + 1] * 2
    assert [float(w.max()) for w in learnt] == [0.5, 1.0]
    assert row.weights[row.subsegments == PREFIX_SUBSEGMENT].max() == 0


def test_targets_are_the_next_token_of_the_same_branch(tokenizing: Tokenizing) -> None:
    row = tokenizing(tree(branch("one?", "11"), branch("two?", "22")))
    for number in (0, 1):
        inside = row.subsegments == number
        ids, targets = row.input_ids[inside], row.targets[inside]
        assert targets[:-1].tolist() == ids[1:].tolist()


def test_every_visual_token_has_a_row_of_pooling(tokenizing: Tokenizing) -> None:
    row = tokenizing(tree(branch("one?", "1")))
    patch_id = tokenizing.encode(IM_PATCH)[0]
    assert int((row.input_ids == patch_id).sum()) == row.pooling.shape[0]
    n_patches = row.crops.shape[0] * row.crops.shape[1]
    assert row.pooling.max() < n_patches
    assert (row.pooling >= 0).any(axis=1).all()


def test_text_alone(tokenizing: Tokenizing) -> None:
    row = tokenizing(Example(branches=(branch("one?", "11"),)))
    chat = render_chat([Turn(role="user", text="one?")])
    assert row.input_ids.tolist() == tokenizing.encode(TURN_END + chat + "11")
    assert (len(row.crops), len(row.pooling), len(row.token_targets)) == (0, 0, 0)
    assert row.crops.shape[1:] == tokenizing(tree(branch("one?", "11"))).crops.shape[1:]


def test_speech_near_a_frame_stands_behind_the_video(tokenizing: Tokenizing) -> None:
    subtitles = [
        Subtitle(start_s=1.5, end_s=1.9, text="red"),
        Subtitle(start_s=7.0, end_s=8.0, text="star"),
    ]
    example = Example(
        frames=[PICTURE] * 2,
        frame_times_s=[0.0, 0.5],
        subtitles=subtitles,
        branches=(branch("one?", "11"), branch("two?", "22")),
    )
    near, every = (
        replace(tokenizing, subtitles_within_s=within_s)(example) for within_s in (1.0, None)
    )
    block = tokenizing.encode("subtitle\n1.5 - 1.9 red\n")
    shared = near.subsegments == PREFIX_SUBSEGMENT
    assert near.input_ids[shared].tolist()[-len(block) :] == block
    assert int((every.subsegments == PREFIX_SUBSEGMENT).sum()) > int(shared.sum())
    assert near.pooling.tolist() == every.pooling.tolist()


def test_which_answer_tokens_are_learnt(tokenizing: Tokenizing) -> None:
    turns = (*branch("a?", "111").turns, *branch("b?", "22").turns)
    example = Example(branches=(Branch(turns=turns, root_length=True),))
    last = replace(tokenizing, last_answer_only=True)(example)
    assert int((last.weights > 0).sum()) == len(tokenizing.encode("22")) + 1
    cut = replace(tokenizing, max_answer_tokens=1)(example)
    assert int((cut.weights > 0).sum()) == 4
    assert cut.weights.max() == 1.0
    rooted = replace(tokenizing, weighting=Weighting(root_subsegments=True, root_length=True))
    own = replace(example.branches[0], root_length=False)
    both = rooted(Example(branches=(own, own)))
    np.testing.assert_allclose(both.weights.max(), 2**-0.5)


def test_visual_tokens_in_a_text_are_refused(tokenizing: Tokenizing) -> None:
    with pytest.raises(InvalidExample, match="spells out visual tokens"):
        tokenizing(tree(branch("one?", IM_PATCH)))


def test_marks_fall_in_the_patch_that_holds_the_centre() -> None:
    mark = MarkedObject(x=0.5, y=0.1, shape=2, colour=4, number=7)
    marked = mark_patches([mark], rows=10, cols=8)
    assert np.flatnonzero(marked[:, 0]).tolist() == [1 * 8 + 4]
    np.testing.assert_allclose(marked[12], [1, 2, 4, -0.5, -0.5, 7, 0, -0.8], atol=1e-6)


def test_marks_of_the_whole_picture_and_of_its_crops_agree(tokenizing: Tokenizing) -> None:
    objects = [[MarkedObject(x=0.75, y=0.4, shape=1, colour=3)]]
    tiled = replace(tokenizing, images=replace(IMAGES, max_crops=4))
    row = tiled(tree(branch("one?", "1"), objects=objects))
    assert len(row.crops) > 2
    assert row.patch_targets.shape[:2] == row.crops.shape[:2]
    n_marks = row.patch_targets[..., 0].sum(axis=1)
    assert n_marks[0] == 1
    assert n_marks[1:].sum() >= 1
    assert {tuple(t[1:3]) for t in row.patch_targets[row.patch_targets[..., 0] > 0]} == {(1.0, 3.0)}


def test_a_single_tile_is_computed_once_for_both_of_its_views(tokenizing: Tokenizing) -> None:
    row = tokenizing(tree(branch("one?", "1")))
    assert row.crops.shape[0] == row.patch_targets.shape[0] == 1
    whole, tile = np.split(row.pooling, 2)
    assert np.array_equal(whole, tile)
    assert (row.input_ids == tokenizing.encode(IM_PATCH)[0]).sum() == len(row.pooling)


def test_a_visual_token_shows_the_objects_of_its_patches(tokenizing: Tokenizing) -> None:
    marked = np.zeros((1, 4, 8), dtype=np.float32)
    marked[0, 1, [0, 5]] = (1, 3)
    marked[0, 2, [0, 5]] = (1, 0)
    pooling = np.array([[0, 1], [1, 2], [3, -1], [-1, 2]])
    assert shown_objects(marked, pooling).tolist() == [8, 9, 0, 1]
    targets = pooled_targets(marked, pooling)
    assert targets[:, [0, 5]].tolist() == [[1, 3], [1, 3], [0, 0], [1, 0]]


def test_learnt_tokens_know_what_they_are_about(tokenizing: Tokenizing) -> None:
    objects = [[MarkedObject(x=0.75, y=0.4, shape=1, colour=3, number=0)]]
    one, none = branch("one?", "11"), branch("two?", "22")
    row = tokenizing(tree(replace(one, about=(0,)), none, objects=objects))
    about = {int(s): set(row.about[row.subsegments == s].tolist()) for s in (0, 1)}
    assert about == {0: {0, 1}, 1: {0}}
    assert (row.about > 0).sum() == len(tokenizing.encode("11"))
    patch_id = tokenizing.encode(IM_PATCH)[0]
    assert (row.shows > 0).sum() >= 1
    assert set(row.input_ids[row.shows > 0].tolist()) == {patch_id}


def test_a_tokenizer_with_a_first_token_of_its_own_begins_rows_with_it(
    tokenizing: Tokenizing,
) -> None:
    example = image_example(np.random.default_rng(3))
    usual, own = tokenizing(example), replace(tokenizing, bos_id=7)(example)
    assert usual.input_ids[0] == tokenizing.encode("<|im_end|>")[0]
    assert own.input_ids[0] == 7
    assert np.array_equal(own.input_ids[1:], usual.input_ids[1:])
    assert np.array_equal(own.targets, usual.targets)
