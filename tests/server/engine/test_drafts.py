"""What drafts foretell, without an engine: a wrong draft must cost nothing but itself."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from molmo_core.prompts import Turn, render_chat, verb_prompt
from molmo_core.tokens import (
    FRAME_END,
    FRAME_START,
    IM_PATCH,
    LOW_RES_IM_START,
    TURN_END,
    VIDEO,
)
from molmo_server.engine.drafts import proposer
from molmo_server.engine.drafts.answer import AnswerSoFar
from molmo_server.engine.drafts.asked import Asked, read_prompt
from molmo_server.engine.drafts.motion import LastDigits, Path
from tests.support.checkpoint import TINY

TRACK = Asked(question="Track the red ball in the video.", groups=("0.0", "0.5", "1.0", "1.3"))
POINT = Asked(question="Point to Cats in all images.", groups=("1", "2"))
COUNT = Asked(question="How many cats are there in the image? Point to each one.", groups=("1",))


def foretold(asked: Asked, said: str) -> str:
    answer = AnswerSoFar(asked)
    answer.read(said)
    return "".join(islice(answer.rest(), 400))


@pytest.mark.parametrize(
    ("asked", "said", "rest"),
    [
        (TRACK, "<", 'tracks coords="0.0 1 500 500;0.5 1 500 500;'),
        (TRACK, '<tracks coords="0.0 1 100 200', ";0.5 1 100 200;1.0 1 100 200;1.3 1 100 200"),
        (TRACK, '<tracks coords="0.0 1 100 200;0.5 1 110 150', ";1.0 1 120 100;1.3 1 "),
        (TRACK, '<tracks coords="0.0 1 100 200 2 500 500;', "0.5 1 100 200 2 500 500;1.0 1 "),
        (TRACK, '<tracks coords="0.0 1 100 200 2 500 500;0.5 2 500 ', "500;1.0 2 500 500;"),
        (TRACK, '<tracks coords="0.0 1 100 200;0.5 1 3', "00 200;1.0 1 "),
        (TRACK, '<tracks coords="0.0 1 020 200;0.5 1 010 200;1.0 1 ', "000 200;1.3 1 000 200"),
        (TRACK, '<tracks coords="1.0 1 100 200;1.', "3 1 100 200"),
        (TRACK, '<tracks coords="1.3 1 100 200', f'">red ball</tracks>{TURN_END}'),
        (TRACK, '<tracks coords="1.3 1 100 200">a ball', ""),
        (TRACK, '<tracks coords="1.3 1 100 200">a ball</', f"tracks>{TURN_END}"),
        (TRACK, "There", f" are none.{TURN_END}"),
        (TRACK, "No tr", f"acks available.{TURN_END}"),
        (TRACK, "The ball", ""),
        (POINT, "<", 'points coords="1 1 500 500">cats</points>'),
        (POINT, '<points coords="1 1 100 200;', f'2 2 500 500">cats</points>{TURN_END}'),
        (POINT, '<points coords="2', " 1 500"),
        (COUNT, "Count", 'ing the <points coords="1 1 '),
        (
            COUNT,
            'Counting the <points coords="1 1 100 200 2 300 400',
            f'">cats</points> shows a total of 2.{TURN_END}',
        ),
        (COUNT, 'Counting the <points coords="1 1 1a', ""),
        (Asked(question="Where is it?", groups=()), '<points coords="1 1 100 200', '">'),
    ],
)
def test_an_answer_goes_on_as_its_form_says(asked: Asked, said: str, rest: str) -> None:
    assert foretold(asked, said)[: len(rest)] == rest
    assert bool(rest) == bool(foretold(asked, said))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*'0159 ;.\t"<>a²٣', " 1 100 200", "1.0 1 1", 'coords="'])))
def test_whatever_is_said_can_be_read(pieces: list[str]) -> None:
    """The engine would end with an error here."""
    said = '<tracks coords="0.0 ' + "".join(pieces)
    at_once = foretold(TRACK, said)
    one_by_one = AnswerSoFar(TRACK)
    for char in said:
        one_by_one.read(char)
        list(islice(one_by_one.rest(), 40))
    assert "".join(islice(one_by_one.rest(), 400)) == at_once


def test_numbers_out_of_proportion_are_no_places() -> None:
    said = f'<tracks coords="0.0 1 {"9" * 5000} 100;{"9" * 400} 1 100 200;1e999 1 100 200;0.5 1 '
    assert foretold(TRACK, said)[:4] == "100 "


def test_an_object_goes_straight_on_from_its_last_two_places() -> None:
    path = Path().on_to(0.0, 100, 900)
    assert (path.at(5.0, 0), path.at(5.0, 1)) == (100, 900)
    path = path.on_to(1.0, 400, 400).on_to(1.5, 300, 500)
    assert (path.at(2.5, 0), path.at(2.5, 1)) == (100, 700)


def test_the_last_digit_is_the_one_that_is_written_most() -> None:
    digits = LastDigits()
    assert digits.write(433.4, "") == "433"
    assert digits.write(433.4, "4") == "433"
    assert digits.write(433.4, "47") == "470"
    assert digits.write(-20.0, "") == "000"
    assert digits.write(1200.0, "") == "999"
    for _ in range(5):
        digits.count(7)
    assert digits.write(433.4, "") == "437"
    assert digits.write(433.4, "42") == "427"


@pytest.mark.parametrize(
    ("verb", "n_images", "has_video", "label"),
    [
        ("track", 0, True, "red ball"),
        ("point", 1, False, "red ball"),
        ("point", 3, False, "red ball"),
        ("point", 0, True, "red ball"),
        ("count", 1, False, "the red ball"),
        ("caption", 1, False, ""),
        ("query", 1, False, ""),
    ],
)
def test_the_prompt_tells_what_a_verb_was_asked_about(verb, n_images, has_video, label) -> None:
    question = verb_prompt(verb, "the Red Ball", n_images=n_images, has_video=has_video)
    text = render_chat([Turn(role="user", text=question)], n_images=n_images)
    asked, said = read_prompt(text.replace("<|image|>", LOW_RES_IM_START) + "<points")
    assert (asked.question, said) == (question, "<points")
    assert asked.groups == tuple(str(k + 1) for k in range(n_images))
    assert asked.label == label.removeprefix("the ")


def test_moments_stand_in_the_prompt() -> None:
    frames = "".join(f"{time} {FRAME_START}{FRAME_END} " for time in ("0.0", "0.5", "0.5", "12.3"))
    text = render_chat([Turn(role="user", text="Track 9.9 in it")], n_videos=1)
    asked, _ = read_prompt(text.replace(VIDEO, frames))
    assert asked.groups == ("0.0", "0.5", "12.3")
    assert read_prompt("no chat at all") == (Asked(question="", groups=()), "")


# The adapter, on token ids

MAX_LEN = 300


class Batch:
    """Rows as vLLM's model runner holds them; `say` appends what was sampled in a step."""

    def __init__(self, n_rows: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(TINY))
        model = SimpleNamespace(max_model_len=MAX_LEN)
        self.speculative = SimpleNamespace(num_speculative_tokens=12, draft_model_config=model)
        config = SimpleNamespace(speculative_config=self.speculative, model_config=model)
        self.proposer = proposer.CoordProposer(config)
        self.ids = np.zeros((n_rows, MAX_LEN), dtype=np.int32)
        self.lengths = np.zeros(n_rows, dtype=np.int32)

    def prompt(self, row: int, thing: str) -> None:
        frames = "".join(f"{k / 2} {FRAME_START}{IM_PATCH * 9}{FRAME_END} " for k in range(4))
        turn = Turn(role="user", text=f"Track the {thing} in the video.")
        ids = self._encode(render_chat([turn], n_videos=1).replace(VIDEO, frames))
        self.lengths[row] = len(ids)
        self.ids[row, : len(ids)] = ids

    def say(self, *texts: str) -> list[str]:
        sampled = [self._encode(text) for text in texts]
        for row, new in enumerate(sampled):
            self.ids[row, self.lengths[row] : self.lengths[row] + len(new)] = new
            self.lengths[row] += len(new)
        drafts = self.proposer.propose(sampled, self.lengths, self.ids, slot_mappings=None)
        assert all(len(draft) <= 12 for draft in drafts)
        return [self.tokenizer.decode(draft) for draft in drafts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    monkeypatch.setattr(proposer, "cached_tokenizer_from_config", lambda config: tokenizer)
    batch = Batch(2)
    batch.prompt(0, "red star")
    batch.prompt(1, "blue star")
    return batch


def test_rows_are_drafted_each_for_itself(batch: Batch) -> None:
    assert batch.say("<", "") == ['tracks coords="0.0 1 500', ""]
    assert batch.say('tracks coords="0.0 1 100 200', "<")[0] == ";0.5 1 100 2"
    assert batch.say(";0.5 1 1", 'tracks coords="1.5 1 3') == [
        "00 200;1.0 1",
        '99 500">blue star</tracks>',
    ]


def test_rows_that_move_are_read_anew(batch: Batch) -> None:
    batch.say("<", "<")
    batch.say('tracks coords="0.0 1 100 200', 'tracks coords="0.0 1 700 300')
    batch.ids[0], batch.lengths[0] = batch.ids[1], batch.lengths[1]
    assert batch.say(";0", ";") == [".5 1 700 300", "0.5 1 700 30"]


def test_nothing_is_drafted_beyond_the_context(batch: Batch) -> None:
    batch.say('<tracks coords="0.0 1 100 200', "<")
    batch.lengths[0] = MAX_LEN - 6
    batch.ids[0, 40 : MAX_LEN - 6] = batch.ids[0, 40]
    drafts = [
        len(batch.proposer.propose([[1], []], batch.lengths + n, batch.ids)[0]) for n in (0, 5)
    ]
    assert max(drafts) <= 5
    assert drafts[1] == 0
    assert batch.speculative.draft_model_config.max_model_len == MAX_LEN + 12
