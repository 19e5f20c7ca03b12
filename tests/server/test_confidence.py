"""How sure the model was of a place, from the log-probabilities of its tokens."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core import api
from molmo_core.points import Point, parse_grounding
from molmo_server.answers.confidence import CALIBRATION, N_ALTERNATIVES, TokenTrail
from molmo_server.answers.events import EngineEvents
from molmo_server.answers.reading import AnswerReader
from molmo_server.engine_pool.fake import logprobs_of
from molmo_server.media.gate import CheckedImage, CheckedMedia
from molmo_server.media.handing import MediaFile
from tests.server.media import data_url, image_part, picture, text_part, video
from tests.support.gateway import RunningGateway, assert_refused, events_of, running_gateway

NO_FILE = MediaFile(data=b"", mime="image/png")
PNG, MP4 = data_url(picture()), data_url(video(), "video/mp4")
TEXT = '<points coords="1 1 250 500">x</points>'


def token(text: str, probability: float = 1.0, **others: float) -> dict[str, Any]:
    """With `_7=0.2`: the digit 7 has probability 0.2."""
    tops = [{"token": text, "logprob": math.log(probability)}]
    tops += [{"token": k[1:], "logprob": math.log(p)} for k, p in others.items()]
    tops += [{"token": filler, "logprob": -99.0} for filler in ("a", "b")]
    return {"token": text, "logprob": math.log(probability), "top_logprobs": tops}


def written(text: str, **changed: dict[str, Any]) -> tuple[TokenTrail, Point]:
    """The tokens of `text`, one a character and certain but for `at_N`; and its first place."""
    tokens = [token(char) for char in text]
    for at, one in changed.items():
        tokens[int(at.removeprefix("at_"))] = one
    trail = TokenTrail()
    trail.feed(tokens)
    grounding = parse_grounding(text)
    return trail, grounding.observations[0]


X, Y = TEXT.index("250"), TEXT.index("500")


def score(text: str = TEXT, **changed: dict[str, Any]) -> float | None:
    trail, point = written(text, **changed)
    return trail.score(point)


def at(position: int, one: dict[str, Any]) -> dict[str, Any]:
    return {f"at_{position}": one}


def test_what_is_certain_has_score_one() -> None:
    assert score() == pytest.approx(1)
    assert score('<points coords="1 1 1000 000">x</points>') == pytest.approx(1)


def test_another_first_digit_is_another_place() -> None:
    assert score(**at(X, token("2", 0.7, _8=0.3))) == pytest.approx(0.7)


def test_near_places_count_as_the_same() -> None:
    # Near 250 are 200 to 300, and half a thousandth of what begins with 3.
    assert score(**at(X, token("2", 0.7, _3=0.3))) == pytest.approx(0.7 + 0.3 * 0.005)
    assert score(**at(X + 1, token("5", 0.6, _6=0.4))) == pytest.approx(1)
    far = '<points coords="1 1 210 500">x</points>'
    assert score(far, **at(X + 1, token("1", 0.6, _9=0.4))) == pytest.approx(0.6)
    assert score(far, **at(X + 1, token("1", 0.6, _6=0.4))) == pytest.approx(0.6 + 0.4 * 0.05)
    assert score(**at(X + 2, token("0", 0.1, _9=0.9))) == pytest.approx(1)


def test_coordinates_and_the_choice_to_go_on_are_multiplied() -> None:
    certain = {**at(X, token("2", 0.5, _9=0.5)), **at(Y, token("5", 0.5, _9=0.5))}
    assert score(**certain) == pytest.approx(0.25)
    before = TEXT.index("1 250") - 1
    assert score(**certain, **at(before, token(" ", 0.8))) == pytest.approx(0.2)


def test_what_the_alternatives_leave_is_spread_over_the_other_digits() -> None:
    # 0.9 known, 0.1 over nine digits, of which those beside it are near in part.
    spread = score(**at(X, token("2", 0.9)))
    assert spread is not None
    assert 0.9 < spread < 0.9 + 0.1 * 2 / 9


@pytest.mark.parametrize(
    "tokens",
    [
        [{"token": char, "logprob": 0.0, "top_logprobs": []} for char in TEXT],
        [token(TEXT[k : k + 2]) for k in range(0, len(TEXT), 2)],
        [token("?"), *map(token, TEXT)],
        [token(TEXT)],
    ],
)
def test_tokens_that_do_not_tell(tokens: list[dict[str, Any]]) -> None:
    trail = TokenTrail()
    trail.feed(tokens)
    assert trail.confidence(parse_grounding(TEXT).points[0]) is None


@given(
    x=st.integers(0, 1000),
    y=st.integers(0, 1000),
    data=st.data(),
)
def test_a_score_is_a_probability(x: int, y: int, data: st.DataObject) -> None:
    text = f'<points coords="1 1 {x:03d} {y:03d}">x</points>'
    trail = TokenTrail()
    for char in text:
        weights = data.draw(st.lists(st.floats(0.01, 1), min_size=11, max_size=11))
        names = dict.fromkeys([char, *"0123456789"])
        shares = [w / sum(weights[: len(names)]) for w in weights[: len(names)]]
        tops = [
            {"token": name, "logprob": math.log(p)} for name, p in zip(names, shares, strict=True)
        ]
        trail.feed([{**tops[0], "top_logprobs": tops}])
    found = trail.score(parse_grounding(text).points[0])
    assert found is not None
    assert 0 <= found <= 1 + 1e-9
    assert 0 <= CALIBRATION.confidence(found) <= 1


def test_the_calibration_keeps_the_order() -> None:
    scores = [0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1]
    confidences = [CALIBRATION.confidence(value) for value in scores]
    assert confidences == sorted(confidences)
    assert (confidences[0], confidences[-1]) == (0, 1)


def expected(text: str) -> float:
    trail = TokenTrail()
    trail.feed(logprobs_of(text)["logprobs"]["content"])
    confidence = trail.confidence(parse_grounding(text).observations[0])
    assert confidence is not None
    return confidence


def test_a_verb_tells_it_when_asked(gateway: RunningGateway) -> None:
    asked = {"image_url": PNG, "object": "red circle"}
    plain = gateway.http.post("/v1/point", json=asked).json()
    told = gateway.http.post("/v1/point", json={**asked, "confidence": True}).json()

    [point] = told["points"]
    assert point.pop("confidence") == expected(gateway.engine.default)
    assert [point] == plain["points"]
    with_it, without = gateway.engine.requests[-1], gateway.engine.requests[-2]
    assert (with_it["logprobs"], with_it["top_logprobs"]) == (True, N_ALTERNATIVES)
    assert "logprobs" not in without


def test_so_do_tracks_and_streams(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = '<tracks coords="0.0 1 100 200;0.5 1 150 200">dog</tracks>'
    asked = {"video_url": MP4, "object": "dog", "confidence": True}
    whole = api.TrackAnswer.model_validate(gateway.http.post("/v1/track", json=asked).json())
    content = gateway.http.post("/v1/track", json={**asked, "stream": True}).content
    *added, done = events_of(content)

    confidences = [point.confidence for point in whole.tracks[0].points]
    assert None not in confidences
    assert [event["item"]["confidence"] for event in added] == confidences
    assert done["answer"]["tracks"] == [track.model_dump() for track in whole.tracks]


def test_chat_tells_it_when_log_probabilities_are_asked_for(gateway: RunningGateway) -> None:
    content = [image_part(picture()), text_part("Where?")]
    asked = {"logprobs": True, "top_logprobs": 5}

    whole = gateway.chat(content, **asked).json()["choices"][0]["message"]["grounding"]
    events = events_of(gateway.stream_bytes(content, **asked))
    deltas = [event["choices"][0]["delta"] for event in events]
    [added] = [d["grounding"] for d in deltas if d.get("grounding", {}).get("op") == "add"]

    assert whole["points"][0]["confidence"] == expected(gateway.engine.default)
    assert deltas[-1]["grounding"] == whole
    assert added["item"]["confidence"] == whole["points"][0]["confidence"]
    plain = gateway.chat(content).json()["choices"][0]["message"]["grounding"]
    assert "confidence" not in plain["points"][0]


def test_tokens_may_come_before_their_text() -> None:
    media = CheckedMedia(images=(CheckedImage(file=NO_FILE, size_hw=(10, 10)),))
    events = EngineEvents(lambda: AnswerReader(media))

    def chunk(content: str, tokens: str) -> bytes:
        choice = {"index": 0, "delta": {"content": content}, **logprobs_of(tokens)}
        return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"

    list(events.feed(chunk("", TEXT[:25])))
    [event] = events.feed(chunk(TEXT, TEXT[25:]))

    [(_, item)] = event.observed
    assert item.confidence == expected(TEXT)
    assert events.n_tokens == 1


def test_a_server_without_alternatives_says_so(folder: Any, tmp_path: Any) -> None:
    with running_gateway(folder, tmp_path, max_logprobs=2, gives_confidence=True) as gateway:
        asked = {"image_url": PNG, "object": "x"}
        refused = gateway.http.post("/v1/point", json={**asked, "confidence": True})
        assert_refused(gateway, refused, "needs 5 alternatives of each token, and this server")
        answer = gateway.http.post("/v1/point", json=asked).json()
        assert "confidence" not in answer["points"][0]
