"""Media that cannot be served are refused with a 4xx; the engine never sees them."""

from __future__ import annotations

import pytest

from tests.server.media import audio_only, data_url, image_part, picture, png_bomb, text_part, video
from tests.support.gateway import RunningGateway, assert_refused, error_of

PNG = data_url(picture())
JPEG = picture(64, 48, "JPEG")

BAD_IMAGES = {
    "not an image": (data_url(b"hello, I am no picture"), "not a picture that can be read"),
    "svg": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a picture"),
    "empty": ("data:image/png;base64,", "not a picture that can be read"),
    "truncated png": (data_url(picture(200, 200)[:-40_000]), "damaged or cut short"),
    "truncated jpeg": (data_url(JPEG[: len(JPEG) // 2], "image/jpeg"), "damaged or cut short"),
    "bomb": (data_url(png_bomb(60_000)), "allowed are 50,000,000 pixels"),
    "large canvas": (data_url(png_bomb(8_000)), "is 8000x8000 pixels"),
    "long canvas": (data_url(picture(4_000, 1)), "aspect of 200:1"),
    "http": ("http://127.0.0.1:9/cat.png", "'http' as URL scheme, only data URLs"),
    "https": ("https://example.com/cat.png", "'https' as URL scheme"),
    "file": ("file:///etc/passwd", "'file' as URL scheme"),
    "path": ("/etc/passwd", "has 'no' as URL scheme"),
    "not base64": ("data:image/png;base64,%%%%", "not valid base64"),
    "no base64": ("data:image/png,rawbytes", "begins with 'data:image/png'"),
    "no comma": ("data:image/png;base64", "begins with"),
    "html": (data_url(picture(), "text/html"), "begins with 'data:text/html"),
    "video as image": (data_url(video(), "image/png"), "not a picture"),
}


BAD_VIDEOS = {
    "audio only": (data_url(audio_only(), "video/mp4"), "no video stream"),
    "not a video": (data_url(b"hello" * 100, "video/mp4"), "not mp4, mov, webm or mkv"),
    "header only": (data_url(video()[:32], "video/mp4"), "cannot be decoded"),
    "truncated": (data_url(video()[:-2000], "video/mp4"), "the video"),
    "playlist": (data_url(b"#EXTM3U\nfile:///etc/passwd", "video/mp4"), "not mp4"),
    "codec": (data_url(video(codec="mpeg4"), "video/mp4"), "codec is mpeg4; allowed are av1"),
    "image as video": (PNG, "begins with 'data:image/png"),
    "http": ("http://127.0.0.1:9/a.mp4", "'http' as URL scheme"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(gateway: RunningGateway, name: str) -> None:
    url, says = BAD_IMAGES[name]

    verb = gateway.http.post("/v1/point", json={"image_url": url, "object": "x"})
    chat = gateway.chat([{"type": "image_url", "image_url": {"url": url}}, text_part("x")])

    assert assert_refused(gateway, verb, says)["code"] == "invalid_media"
    assert error_of(chat) == error_of(verb)


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos(gateway: RunningGateway, name: str) -> None:
    url, says = BAD_VIDEOS[name]

    response = gateway.http.post("/v1/track", json={"video_url": url, "object": "x"})

    assert assert_refused(gateway, response, says)["code"] == "invalid_media"


def test_the_message_names_the_picture_at_fault(gateway: RunningGateway) -> None:
    response = gateway.http.post("/v1/point", json={"images": [PNG, data_url(b"x")], "object": "x"})

    assert_refused(gateway, response, "image 2 is not a picture")


@pytest.mark.parametrize("count", [5, 12])
def test_too_many_images(gateway: RunningGateway, count: int) -> None:
    json_response = gateway.http.post("/v1/point", json={"images": [PNG] * count, "object": "x"})
    chat = gateway.chat([*[image_part(picture())] * count, text_part("x")])

    error = assert_refused(gateway, json_response, f"got {count} images, allowed are 4")
    assert error["code"] == "too_many_media"
    assert error_of(chat) == error


def test_too_many_uploads(gateway: RunningGateway) -> None:
    for count, says in ((5, "got 5 images, allowed are 4"), (30, "Too many files")):
        files = [("image", (f"{k}.png", picture())) for k in range(count)]
        response = gateway.http.post("/v1/point", data={"object": "x"}, files=files)
        assert_refused(gateway, response, says)


def test_oversize_media(small_gateway: RunningGateway) -> None:
    large = picture(300, 300)
    assert len(large) > 200_000

    for response in (
        small_gateway.http.post("/v1/point", json={"image_url": data_url(large), "object": "x"}),
        small_gateway.http.post("/v1/point", data={"object": "x"}, files={"image": large}),
    ):
        assert_refused(small_gateway, response, "bytes, allowed are 200,000; send a smaller")


def test_long_and_large_videos(small_gateway: RunningGateway) -> None:
    url = data_url(video(n_frames=50), "video/mp4")

    response = small_gateway.http.post("/v1/track", json={"video_url": url, "object": "x"})

    assert_refused(small_gateway, response, "the video lasts 2.0 s, allowed are 1 s")
