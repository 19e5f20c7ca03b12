"""What fetching a file sends, believes and waits for."""

from __future__ import annotations

import asyncio
import base64
import gzip

import aiohttp
import pytest

from molmo_core.errors import InvalidMedia
from molmo_server.media.gate import MediaGate
from molmo_server.media.remote import Pinned
from molmo_server.settings import MolmoSettings
from tests.server.internet import Internet, Serve, answer, redirect
from tests.server.media import picture, png_bomb, video

CAT = "http://pictures.example/cat.png"
CLIP = "http://pictures.example/clip"
PAGE, CLIP_PAGE = "pictures.example/cat.png", "pictures.example/clip"


async def test_a_picture_is_sent_to_the_engine_as_its_bytes(world: Internet) -> None:
    data = picture(40, 30, "JPEG")
    world.pages[PAGE] = answer(data, content_type="text/html")  # nobody believes it
    gate = MediaGate(MolmoSettings(), remote=world.media())

    checked = await gate.check([CAT], [])

    [image] = checked.images
    assert image.file.data_url() == f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    assert image.size_hw == (30, 40)


async def test_a_video_is_looked_at_once(world: Internet) -> None:
    world.pages[CLIP_PAGE] = answer(video(n_frames=10))
    known: list[None] = []
    gate = MediaGate(MolmoSettings(), remote=world.media(), on_known=lambda: known.append(None))

    first, second = await gate.check([], [CLIP]), await gate.check([], [CLIP])

    assert first == second
    assert first.video is not None
    assert first.video.info.n_frames == 10
    assert len(known) == 1
    assert len(world.heads) == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "image 1 is not a picture"),
        (b"root:x:0:0:root:/root:/bin/sh", "image 1 is not a picture"),
        (b"<html>secret", "image 1 is not a picture"),
        (picture()[:-200], "image 1 is damaged or cut short"),
        (png_bomb(60_000), "allowed are 50,000,000 pixels"),
        (video(), "image 1 is not a picture"),
    ],
)
async def test_what_arrives_is_looked_at_like_all_else(
    world: Internet, body: bytes, says: str
) -> None:
    world.pages[PAGE] = answer(body)

    with pytest.raises(InvalidMedia, match=says) as caught:
        await MediaGate(MolmoSettings(), remote=world.media()).check([CAT], [])

    assert "root" not in caught.value.message
    assert "secret" not in caught.value.message


async def test_nothing_of_ours_is_sent_along(
    world: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    world.pages["pictures.example/0?a=b"] = answer(
        status=302, location="/1", set_cookie="id=7; Path=/", www_authenticate="Basic"
    )
    world.pages["pictures.example/1"] = answer(b"cat")

    assert await world.media().fetch("http://pictures.example/0?a=b", "image 1", 9) == b"cat"

    for head, path in zip(world.heads, ("/0?a=b", "/1"), strict=True):
        first, *fields = head.strip().split("\r\n")
        assert first == f"GET {path} HTTP/1.1"
        assert {field.partition(":")[0].lower() for field in fields} == {
            *("host", "accept", "accept-encoding", "user-agent", "connection")
        }
        assert "Host: pictures.example" in fields


async def test_https_asks_for_the_name_and_believes_no_other(world: Internet) -> None:
    with pytest.raises(InvalidMedia, match=r"could not be fetched from pictures.example; check"):
        await world.media().fetch("https://pictures.example/cat.png", "image 1", 9)

    [hello] = world.heads
    assert "pictures.example" in hello  # the name that the certificate has to be for


async def test_connections_go_to_the_pinned_address_whatever_the_name(world: Internet) -> None:
    world.pages[f"anything.example:{world.port}/"] = answer(b"here")
    connector = aiohttp.TCPConnector(resolver=Pinned(["127.0.0.1"]), use_dns_cache=False)

    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://anything.example:{world.port}/") as response,
    ):
        assert await response.read() == b"here"


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\n\r\n")
    while True:
        writer.write(bytes(64 * 1024))
        await writer.drain()


async def chunked(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(5):
        writer.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def boastful(writer: asyncio.StreamWriter) -> None:
    """Says what it will not send."""
    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 10000000000\r\n\r\n")
    await silent(writer)


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        (endless, "has more than 3,000 bytes, which is what is allowed"),
        (chunked, "has more than 3,000 bytes"),
        (answer(bytes(3001)), "has 3,001 bytes, allowed are 3,000; send a smaller file"),
        (boastful, "has 10,000,000,000 bytes, allowed are"),
    ],
)
async def test_a_file_that_is_too_large_is_cut(world: Internet, serve: Serve, says: str) -> None:
    world.pages[PAGE] = serve

    with pytest.raises(InvalidMedia, match=says):
        await world.media().fetch(CAT, "image 1", 3000)


async def test_a_packed_file_is_not_unpacked(world: Internet) -> None:
    packed = gzip.compress(bytes(10_000_000))
    world.pages[PAGE] = answer(packed, content_encoding="gzip")

    assert await world.media().fetch(CAT, "image 1", 20_000) == packed


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def dripping(writer: asyncio.StreamWriter) -> None:
    """Never silent for long, never at an end."""
    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 1000000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def dripping_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("serve", [silent, dripping, dripping_head])
async def test_a_slow_server_is_left_at_the_deadline(world: Internet, serve: Serve) -> None:
    world.pages[PAGE] = serve
    world.pages["pictures.example/0"] = redirect("/cat.png")
    clock = asyncio.get_running_loop().time
    began_s = clock()

    with pytest.raises(InvalidMedia, match=r"did not arrive within 0\.3 s; upload the file"):
        await world.media(remote_timeout_s=0.3).fetch(
            "http://pictures.example/0", "image 1", 2_000_000
        )

    assert clock() - began_s < 5


async def test_a_name_that_takes_too_long_is_left_at_the_deadline(
    world: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(world, "look_up", never)
    with pytest.raises(InvalidMedia, match=r"did not arrive within 0\.1 s"):
        await world.media(remote_timeout_s=0.1).fetch(CAT, "image 1", 9)


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\nhalf")


async def modest(writer: asyncio.StreamWriter) -> None:
    """Says less than it sends."""
    writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 4\r\n\r\n" + bytes(5000))


async def garbage(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xff\x00secret\r\n\r\n")


async def long_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\nx: " + b"secret" * 100_000 + b"\r\n\r\n")


async def nothing(writer: asyncio.StreamWriter) -> None:
    pass


@pytest.mark.parametrize("serve", [cut, modest, garbage, long_head, nothing])
async def test_a_server_that_breaks_is_not_quoted(world: Internet, serve: Serve) -> None:
    world.pages[PAGE] = serve

    with pytest.raises(InvalidMedia) as caught:
        await world.media().fetch(CAT, "image 1", 2_000_000)

    assert caught.value.message == (
        "image 1 could not be fetched from pictures.example; check the URL, or upload the file "
        "(POST /v1/media) or send it as a data URL"
    )


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 404, 500, 503])
async def test_any_other_status_is_told_by_its_number(world: Internet, status: int) -> None:
    body = b"" if status in (204, 304) else b"secret"
    world.pages[PAGE] = answer(body, status)

    with pytest.raises(InvalidMedia, match=f"pictures.example answered with status {status};") as e:
        await world.media().fetch(CAT, "image 1", 100)

    assert "secret" not in e.value.message
