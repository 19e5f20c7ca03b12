"""Uploads that are refused leave nothing, and no name that a caller writes is a path."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.server.media import audio_only, picture, png_bomb, video
from tests.support.gateway import RunningGateway, assert_refused

PNG = picture()


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.png",
        "/etc/cron.d/evil",
        "..\\..\\evil.png",
        "media-00000000000000000000000000000000",
        ".part-evil",
        "evil\0.png",
        "a" * 2000,
        "%2e%2e%2fevil",
        "evil.png; rm -rf",
        "",
    ],
)
def test_names_of_files_are_not_looked_at(
    keeping: RunningGateway, media_dir: Path, name: str
) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
        + name.encode()
        + b'"\r\nContent-Type: image/png\r\n\r\n'
        + PNG
        + b"\r\n--b--\r\n"
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    media_id = keeping.http.post("/v1/media", content=form, headers=kind).json()["id"]

    assert media_id == f"media-{hashlib.sha256(PNG).hexdigest()[:32]}"
    assert [path.name for path in media_dir.iterdir()] == [media_id]
    assert (media_dir / media_id).stat().st_mode & 0o777 == 0o600
    assert list(media_dir.parent.iterdir()) == [media_dir]


@pytest.mark.parametrize(
    "media_id",
    [
        "media-00000000000000000000000000000000",
        "media-",
        "..",
        "../media",
        "../../../../etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/etc/passwd",
        ".part-0",
        "x\0y",
        "MEDIA-0",
        "",
        "x" * 5000,
    ],
)
def test_ids_that_are_none(keeping: RunningGateway, media_id: str) -> None:
    for url in (f"media://{media_id}", f"media:{media_id}", f"MEDIA://{media_id}"):
        response = keeping.http.post("/v1/point", json={"image_url": url, "object": "x"})
        error = assert_refused(keeping, response, "there is no uploaded file", 404)
        assert error["code"] == "media_not_found"


BAD_FILES = {
    "text": (b"hello, I am no picture", "the file is not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the file is not a picture"),
    "empty": (b"", "the file is not a picture"),
    "playlist": (b"#EXTM3U\nfile:///etc/passwd", "the file is not a picture"),
    "cut picture": (picture(200, 200)[:-40_000], "damaged or cut short"),
    "bomb": (png_bomb(60_000), "allowed are 50,000,000 pixels"),
    "large canvas": (png_bomb(8_000), "is 8000x8000 pixels"),
    "long canvas": (picture(4_000, 1), "aspect of 200:1"),
    "audio": (audio_only(), "no video stream"),
    "cut video": (video()[:-2000], "the video"),
    "codec": (video(codec="mpeg4"), "codec is mpeg4; allowed are av1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_not_kept(keeping: RunningGateway, media_dir: Path, name: str) -> None:
    data, says = BAD_FILES[name]

    for response in (
        keeping.http.post("/v1/media", files={"file": data}),
        keeping.http.post("/v1/media", content=data, headers={"content-type": "video/mp4"}),
    ):
        assert assert_refused(keeping, response, says)["code"] == "invalid_media"
    assert list(media_dir.iterdir()) == []


def test_limits_of_uploads(small_gateway: RunningGateway) -> None:
    for data, says, status in (
        (picture(300, 300), "bytes, allowed are 200,000; send a smaller file", 400),
        (video(n_frames=50), "the video lasts 2.0 s, allowed are 1 s", 400),
        (bytes(1_000_001), "the body has more than 1,000,000 bytes", 413),
    ):
        response = small_gateway.http.post("/v1/media", files={"file": data})
        assert_refused(small_gateway, response, says, status)


@pytest.mark.parametrize(
    ("sent", "says", "status"),
    [
        ({"files": {"image": PNG}}, "the form has the fields 'image'; send one file", 400),
        ({"files": {"file": PNG}, "data": {"name": "x"}}, "'name'", 400),
        ({"files": [("file", PNG), ("file", PNG)]}, "the fields 'file', 'file'; send one", 400),
        ({"files": [("file", PNG)] * 9}, "Too many files", 400),
        ({"files": {"x": (None, "y")}}, "'x'; send one file, in a field named 'file'", 400),
        ({"files": {"file": (None, "y")}}, "send one file", 400),
        ({"json": {"file": "x"}}, "got the content-type 'application/json'; send image/*", 415),
        ({"content": PNG}, "got the content-type ''; send image/*", 415),
    ],
)
def test_bodies_that_are_no_upload(
    keeping: RunningGateway, sent: dict[str, Any], says: str, status: int
) -> None:
    assert_refused(keeping, keeping.http.post("/v1/media", **sent), says, status)


def test_a_body_that_does_not_end(small_gateway: RunningGateway) -> None:
    with small_gateway.connection() as caller:
        caller.putrequest("POST", "/v1/media")
        caller.putheader("content-type", "image/png")
        caller.putheader("content-length", "1000")
        caller.endheaders(b"half")
        assert caller.getresponse().status == 408
