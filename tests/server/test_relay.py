"""The engine's stream is passed on event by event, in whatever pieces it comes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.errors import EngineFailed
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.relay import StreamRelay
from molmo_server.engine_pool.fake import stream_events
from molmo_server.media.gate import CheckedImage, CheckedMedia
from molmo_server.media.handing import MediaFile
from tests.support.gateway import events_of

FILE = MediaFile(data=b"", mime="image/png")
MEDIA = CheckedMedia(images=(CheckedImage(file=FILE, size_hw=(100, 200)),))
IDENTITY = {"id": "chatcmpl-1", "created": 5, "model": "m"}
DONE = b"data: [DONE]\n\n"


def new_relay() -> StreamRelay:
    return StreamRelay(
        lambda: AnswerReader(MEDIA), stream_id="chatcmpl-0", model="m", fingerprint="c@1"
    )


def stream_of(text: str, size: int = 5) -> bytes:
    pieces = [text[k : k + size] for k in range(0, len(text), size)]
    return "".join(stream_events(IDENTITY, pieces, "stop", n_choices=1)).encode()


def is_ours(event: bytes) -> bool:
    return b'"grounding"' in event


def ours(passed: bytes) -> list[Any]:
    """The events that the engine did not send."""
    return [orjson.loads(e[6:]) for e in passed.split(b"\n\n") if is_ours(e)]


def without_ours(passed: bytes) -> bytes:
    events = passed.removesuffix(DONE).split(b"\n\n")
    return b"\n\n".join(e for e in events if not is_ours(e))


@given(cuts=st.lists(st.integers(0, 1500), max_size=30))
def test_any_chunking_passes_the_same_bytes(cuts: list[int]) -> None:
    stream = stream_of('A <points coords="1 1 250 500">x</points> data: [DONE]\n\nB') + DONE
    relay = new_relay()
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]

    passed = b"".join(relay.feed(stream[a:b]) for a, b in pairwise(edges))

    relay.check_end()
    assert without_ours(passed) == stream.removesuffix(DONE)
    assert passed.endswith(DONE)
    added, whole = ours(passed)
    for event in (added, whole):
        assert event["id"] == "chatcmpl-1"
        assert event["system_fingerprint"] == "c@1"
    [point] = whole["choices"][0]["delta"]["grounding"]["points"]
    assert point["pixel"] == {"x": 50.0, "y": 50.0}
    assert added["choices"][0]["delta"]["content"] == ""
    assert added["choices"][0]["delta"]["grounding"] == {
        "op": "add",
        "item": {
            "kind": "point",
            "id": 1,
            "media_index": 0,
            "x": 0.25,
            "y": 0.5,
            "pixel": {"x": 50.0, "y": 50.0},
            "span": point["span"],
        },
    }


def test_a_place_follows_the_event_that_completes_it() -> None:
    relay = new_relay()
    pieces = ['<points coords="1 1 250 500', " ", "2 300 400", '">x', "</points>"]
    stream = "".join(stream_events(IDENTITY, pieces, "stop", n_choices=1)).encode()

    events = events_of(relay.feed(stream + DONE))
    deltas = [event["choices"][0]["delta"] for event in events]
    seen = [
        d["grounding"]["item"]["id"] if "op" in d.get("grounding", {}) else d.get("content")
        for d in deltas
    ]

    assert seen == ["", pieces[0], " ", 1, pieces[2], pieces[3], 2, pieces[4], None, None]


def test_a_place_that_the_end_completes_comes_before_the_whole() -> None:
    relay = new_relay()

    added, whole = ours(relay.feed(stream_of('<points coords="1 1 250 500') + DONE))

    assert added["choices"][0]["delta"]["grounding"]["item"]["x"] == 0.25
    grounding = whole["choices"][0]["delta"]["grounding"]
    assert [p["x"] for p in grounding["points"]] == [0.25]
    assert [w["code"] for w in grounding["warnings"]] == ["truncated"]


def test_text_without_places_costs_no_event() -> None:
    assert len(ours(new_relay().feed(stream_of("A field of grass.") + DONE))) == 1


@given(text=st.text(st.sampled_from('ab {}"\\\n<>é1,:'), max_size=40), n_choices=st.integers(1, 3))
def test_every_text_is_read_as_it_was_written(text: str, n_choices: int) -> None:
    """Also texts that look like the events around them, and choices that take turns."""
    read: dict[int, str] = {}

    class Reader(AnswerReader):
        def __init__(self) -> None:
            super().__init__(MEDIA)
            self._index = len(read)
            read[self._index] = ""

        def feed(self, text: str, tokens: Any = None) -> list[Any]:
            read[self._index] += text
            return super().feed(text, tokens)

    relay = StreamRelay(Reader, stream_id="chatcmpl-0", model="m", fingerprint="c@1")
    pieces = [*text, '"},"logprobs":null', *reversed(text)]
    one_by_one = stream_events(IDENTITY, pieces, "stop", n_choices=n_choices)
    turns = [one for k in range(len(pieces) + 2) for one in one_by_one[k :: len(pieces) + 2]]

    for event in turns:
        assert relay.feed(event.encode()) == event.encode()

    assert read == dict.fromkeys(range(n_choices), "".join(pieces))


def test_only_whole_events_are_passed_on() -> None:
    relay = new_relay()

    assert relay.feed(b'data: {"choices": []}\n') == b""
    assert relay.feed(b"\ndata: {") == b'data: {"choices": []}\n\n'


def test_what_came_before_a_failure_is_passed_on() -> None:
    relay = new_relay()
    begun = stream_of("abc")

    assert relay.feed(begun + b'data: {"error": {"message": "dead"}}\n\n' + DONE) == begun
    assert relay.has_ended
    with pytest.raises(EngineFailed, match="failed in the middle"):
        relay.check_end()


@pytest.mark.parametrize(
    "event", [b"{", b"\xff", b"[]", b"7", b'{"choices": [{}]}', b'{"choices": [{"index": 0}]}']
)
def test_an_event_that_is_no_chunk_is_a_failure(event: bytes) -> None:
    relay = new_relay()
    begun = stream_of("abc")

    assert relay.feed(begun + b"data: " + event + b"\n\n" + DONE) == begun
    with pytest.raises(EngineFailed, match="failed in the middle"):
        relay.check_end()


def test_a_stream_without_its_end_is_a_failure() -> None:
    relay = new_relay()
    relay.feed(stream_of("abc"))

    assert not relay.has_ended
    with pytest.raises(EngineFailed, match="ended in the middle"):
        relay.check_end()


def test_each_choice_is_read_for_itself() -> None:
    relay = new_relay()

    def chunk(index: int, text: str) -> bytes:
        choice = {"index": index, "delta": {"content": text}}
        return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"

    relay.feed(chunk(1, '<points coords="1 1 25'))
    relay.feed(chunk(0, '<points coords="1 1 500'))
    relay.feed(chunk(1, '0 500">x</points>'))
    relay.feed(chunk(0, ' 500">x</points>'))

    choices = events_of(relay.feed(DONE))[-1]["choices"]
    assert [c["index"] for c in choices] == [0, 1]
    assert [c["delta"]["grounding"]["points"][0]["x"] for c in choices] == [0.5, 0.25]
