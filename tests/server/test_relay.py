"""The engine's stream is passed on event by event, in whatever pieces it comes."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.errors import EngineFailed
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.relay import StreamRelay
from molmo_server.engine_pool.fake import stream_events
from molmo_server.media.gate import CheckedImage, CheckedMedia
from tests.support.gateway import events_of

MEDIA = CheckedMedia(images=(CheckedImage(url="data:", size_hw=(100, 200)),))
IDENTITY = {"id": "chatcmpl-1", "created": 5, "model": "m"}
DONE = b"data: [DONE]\n\n"


def new_relay() -> StreamRelay:
    return StreamRelay(
        lambda: AnswerReader(MEDIA), stream_id="chatcmpl-0", model="m", fingerprint="c@1"
    )


def stream_of(text: str, size: int = 5) -> bytes:
    pieces = [text[k : k + size] for k in range(0, len(text), size)]
    return "".join(stream_events(IDENTITY, pieces, "stop", n_choices=1)).encode()


@given(cuts=st.lists(st.integers(0, 1500), max_size=30))
def test_any_chunking_passes_the_same_bytes(cuts: list[int]) -> None:
    stream = stream_of('A <points coords="1 1 250 500">x</points> data: [DONE]\n\nB') + DONE
    relay = new_relay()
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]

    passed = b"".join(relay.feed(stream[a:b]) for a, b in pairwise(edges))

    relay.check_end()
    assert passed.startswith(stream.removesuffix(DONE))
    assert passed.endswith(DONE)
    added = events_of(passed)[-1]
    assert added["id"] == "chatcmpl-1"
    assert added["system_fingerprint"] == "c@1"
    [point] = added["choices"][0]["delta"]["grounding"]["points"]
    assert point["pixel"] == {"x": 50.0, "y": 50.0}


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
