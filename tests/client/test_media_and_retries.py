"""What becomes a data URL, when a request is worth another try, what errors become."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from molmo_client import RequestFailed, RetryPolicy, encode
from molmo_client.failures import failure_of
from molmo_client.media import EncodedMedia, encode_all, media_type
from molmo_core import errors
from molmo_core.errors import InvalidMedia, MolmoError
from tests.server import media


def decoded(url: str) -> np.ndarray:
    content = base64.b64decode(url.partition(",")[2])
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture)


def test_an_array_arrives_as_it_was() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = encode(array)
    assert encoded.url.startswith("data:image/png;base64,")
    assert (decoded(encoded.url) == array).all()
    assert (decoded(encode(array[:, :, 0]).url) == array[:, :, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_are_known_by_their_bytes(kind: str) -> None:
    content = media.picture(kind=kind)
    assert encode(content).url.startswith(f"data:image/{kind.lower()};base64,")
    assert encode(io.BytesIO(content)) == encode(content)


def test_videos_are_known_by_their_bytes() -> None:
    encoded = encode(media.video())
    assert encoded.kind == "video"
    assert encoded.url.startswith("data:video/mp4;base64,")
    assert media_type(b"\x1a\x45\xdf\xa3rest") == "video/webm"
    assert media_type(b"\0\0\0\x20ftypavif") == "image/avif"


def test_addresses_stay_as_they_are() -> None:
    assert encode("https://x/clip.MP4?sig=1").kind == "video"
    assert encode("https://x/cat").kind == "image"
    assert encode("data:video/webm;base64,AAAA").kind == "video"
    assert encode("media://media-0") == EncodedMedia(url="media://media-0", kind="image")
    encoded = encode("https://x/cat.png")
    assert encode(encoded) is encoded


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("missing.png"), "cannot read missing.png: No such file"),
        (Path("."), "Is a directory"),
        (b"hello", r"no picture or video \(5 bytes\)"),
        (io.StringIO("text"), "binary mode"),
        (42, "cannot send a int"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\)"),
    ],
)
def test_what_cannot_be_sent(value: object, message: str) -> None:
    with pytest.raises(InvalidMedia, match=message):
        encode(value)


def test_mixtures_are_refused() -> None:
    picture, clip = media.picture(), media.video()
    assert len(encode_all([picture, picture])) == 2
    for mixture in ([clip, clip], [picture, clip], []):
        with pytest.raises(InvalidMedia, match="one or more pictures, or one video"):
            encode_all(mixture)


# --- retries ----------------------------------------------------------------------------------


def answer(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, headers=headers)


def test_waits_double_up_to_the_longest() -> None:
    policy = RetryPolicy(n_retries=9)
    waits = [policy.delay_s(n, answer(503), jitter=0.0) for n in range(1, 8)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert policy.delay_s(1, answer(503), jitter=1.0) == 0.375
    assert policy.delay_s(10, answer(503), jitter=0.0) is None


@pytest.mark.parametrize(
    ("retry_after", "delay_s"),
    [("3", 3.0), ("0", 0.0), ("120", 120.0), ("121", None), ("-1", 0.5), ("soon", 0.5)],
)
def test_retry_after_is_obeyed(retry_after: str, delay_s: float | None) -> None:
    outcome = answer(503, **{"retry-after": retry_after})
    assert RetryPolicy().delay_s(1, outcome, jitter=0.0) == delay_s


@pytest.mark.parametrize(
    ("outcome", "is_tried"),
    [
        (answer(200), False),
        (answer(400), False),
        (answer(404), False),
        (answer(429), True),
        (answer(502), True),
        (answer(503), True),
        (answer(503, **{"x-should-retry": "false"}), False),
        (answer(400, **{"x-should-retry": "true"}), True),
        (httpx2.ConnectError(""), True),
        (httpx2.ConnectTimeout(""), True),
        (httpx2.ReadError(""), True),
        (httpx2.ReadTimeout(""), False),
        (httpx2.UnsupportedProtocol(""), False),
    ],
)
def test_what_is_tried_again(
    outcome: httpx2.Response | httpx2.TransportError, is_tried: bool
) -> None:
    assert (RetryPolicy().delay_s(1, outcome, jitter=0.0) is not None) is is_tried


# --- errors -----------------------------------------------------------------------------------


def all_leaves() -> list[type[MolmoError]]:
    def below(kind: type[MolmoError]) -> list[type[MolmoError]]:
        return [kind, *(leaf for sub in kind.__subclasses__() for leaf in below(sub))]

    return [kind for kind in below(MolmoError) if kind.__module__ == "molmo_core.errors"]


@pytest.mark.parametrize("leaf", all_leaves())
def test_every_error_of_the_tree_comes_back_as_itself(leaf: type[MolmoError]) -> None:
    sent = leaf("what happened", param="images")
    body = json.dumps(sent.envelope()).encode()
    raised = failure_of(sent.status, {"x-request-id": "r1", "retry-after": "2"}, body)
    assert isinstance(raised, leaf)
    assert isinstance(raised, RequestFailed)
    assert (raised.message, raised.param, raised.request_id) == ("what happened", "images", "r1")
    assert (raised.status, raised.retry_after_s) == (sent.status, 2.0)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"[]", b'{"error": 1}', b"[" * 100_000, b'{"error": {"message": null}}'],
)
def test_any_body_becomes_an_error(body: bytes) -> None:
    raised = failure_of(504, {}, body)
    assert isinstance(raised, errors.DeadlineExceeded)
    assert raised.message
    assert len(raised.message) <= 201
