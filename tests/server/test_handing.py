"""Files handed to an engine by name: private, one name a request, gone when that is over."""

from __future__ import annotations

import asyncio
import base64
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
from molmo_server.engine_pool.fake import FakeEngine, Trick
from molmo_server.media.handing import HandedFiles, MediaFile
from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, image_part, picture, text_part
from tests.support.gateway import FAST, RunningGateway, run_fake, serve_in_thread, until

FILE = MediaFile(data=b"cat", mime="image/png")


async def test_a_file_is_written_once_for_a_request_and_privately(tmp_path: Path) -> None:
    files, others = HandedFiles(), HandedFiles()
    url = await files.url(FILE, tmp_path)
    assert url == await files.url(FILE, tmp_path)
    other = await others.url(FILE, tmp_path)
    assert other != url

    path = Path(url.removeprefix("file://"))
    assert path.read_bytes() == b"cat"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files.clear()
    assert [found.as_uri() for found in tmp_path.iterdir()] == [other]
    others.clear()
    assert list(tmp_path.iterdir()) == []


async def test_a_request_that_ends_while_a_file_is_written_leaves_none(tmp_path: Path) -> None:
    files, may_write = HandedFiles(), threading.Event()
    write = files._write

    def late(*arguments: Any) -> None:
        assert may_write.wait(10)
        write(*arguments)

    files._write = late
    asking = asyncio.create_task(files.url(FILE, tmp_path))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    files.clear()
    may_write.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert list(tmp_path.iterdir()) == []


async def test_without_a_folder_the_file_is_sent_whole(tmp_path: Path) -> None:
    files = HandedFiles()
    expected = f"data:image/png;base64,{base64.b64encode(b'cat').decode()}"
    assert await files.url(FILE, None) == expected
    assert await files.url(FILE, tmp_path / "gone") == expected
    files.clear()


async def test_what_came_encoded_is_not_encoded_again() -> None:
    file = MediaFile(data=b"", mime="image/png", encoded="Y2F0")
    assert await HandedFiles().url(file, None) == "data:image/png;base64,Y2F0"


class Seeing(FakeEngine):
    """Notes what the named files hold when it is asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, []

    async def _misbehave(self, question, request):
        self.seen.append([path.read_bytes() for path in self.folder.iterdir()])
        return await super()._misbehave(question, request)


def test_the_gateway_hands_files_over_and_clears_up(folder: Path, tmp_path: Path) -> None:
    handed, png = tmp_path / "handed", picture()
    handed.mkdir(mode=0o700)
    engine, socket = Seeing(handed), tmp_path / "engine.sock"

    def engines() -> EnginePool:
        own = RemoteEngine(name="engine-0", address=EngineAddress(socket=socket), timing=FAST)
        own.media_folder = handed
        return EnginePool([own])

    settings = MolmoSettings(checkpoint=folder, drain_s=0.5, deadline_s=20)
    with run_fake(engine, socket), serve_in_thread(settings, engines) as url:
        gateway = RunningGateway(url=url, engine=engine)
        with gateway.http:
            until(gateway.is_ready)
            fields = {"images": [data_url(png), data_url(png)], "object": "x"}
            assert gateway.http.post("/v1/point", json=fields).status_code == 200
            gateway.stream_bytes([image_part(png), text_part("?")])
            gateway.stream_bytes([image_part(png), text_part(Trick.BREAK)])
            gateway.chat([image_part(png), text_part(Trick.BREAK_FIRST)])
            gateway.chat([image_part(png), text_part(Trick.REFUSE)])
    assert engine.seen[:2] == [[png, png], [png]]
    parts = [part for body in engine.requests for part in body["messages"][0]["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith(f"file://{handed}/") for url in urls)
    assert len(urls) == 7, "once more after the break before the first byte"
    assert list(handed.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "FILE:///etc/hostname", "media:///etc"])
def test_callers_name_no_files(gateway: RunningGateway, url: str) -> None:
    response = gateway.http.post("/v1/point", json={"image_url": url, "object": "x"})
    assert response.status_code in (400, 404)
    assert gateway.engine.requests == []
