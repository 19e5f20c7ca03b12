"""Events of a stream that is not a chat's, and what is none."""

from __future__ import annotations

import pytest

from molmo_core.errors import EngineFailed
from molmo_server.answers.splitting import EventSplitter

GOOD = b'data: {"choices": []}\n\n'


def test_events_in_any_pieces() -> None:
    stream = GOOD + b": a remark\n\n" + GOOD + b"data: [DONE]\n\n"
    for n_bytes in (1, 7, len(stream)):
        events = EventSplitter()
        pieces = [stream[k : k + n_bytes] for k in range(0, len(stream), n_bytes)]
        found = [one for piece in pieces for one in events.feed(piece)]
        assert found == [(GOOD, {"choices": []})] * 2
        assert events.is_done
        events.check_end()


@pytest.mark.parametrize("data", [b'{"error": {"message": "no"}}', b"{", b"5", b"[]", b"null", b""])
def test_whatever_is_no_completion_is_a_failure(data: bytes) -> None:
    events = EventSplitter()
    assert list(events.feed(GOOD + b"data: " + data + b"\n\n" + GOOD)) == [(GOOD, {"choices": []})]
    with pytest.raises(EngineFailed, match="the engine failed in the middle of the answer"):
        events.check_end()
