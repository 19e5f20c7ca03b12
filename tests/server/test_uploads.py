"""`/v1/media`: what is uploaded once is asked about by its id."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import InvalidMedia
from molmo_server.engine_pool.fake import Trick
from molmo_server.media.gate import MediaGate
from molmo_server.media.spool import Spool
from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, picture, text_part, video
from tests.server.test_routes_ops import sample
from tests.support.gateway import RunningGateway, assert_refused, error_of, running_gateway

PNG = picture()
MP4 = video(n_frames=10)
HITS = "molmo_media_cache_hits_total"


def upload(gateway: RunningGateway, data: bytes, kind: str = "image/png") -> dict[str, Any]:
    response = gateway.http.post("/v1/media", content=data, headers={"content-type": kind})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_picture(keeping: RunningGateway, media_dir: Path) -> None:
    answer = keeping.http.post("/v1/media", files={"file": ("cat.png", PNG)}).json()

    media_id = f"media-{hashlib.sha256(PNG).hexdigest()[:32]}"
    created_at, expires_at = answer.pop("created_at"), answer.pop("expires_at")
    assert answer == {
        **{"id": media_id, "object": "media", "type": "image", "bytes": len(PNG)},
        **{"width": 64, "height": 48, "duration": None, "fps": None},
    }
    assert expires_at - created_at == 24 * 3600
    assert (media_dir / media_id).read_bytes() == PNG
    assert sample(keeping, "molmo_media_bytes") == len(PNG)


def test_a_video(keeping: RunningGateway) -> None:
    answer = upload(keeping, MP4, "video/mp4")

    facts = {name: answer[name] for name in ("type", "bytes", "width", "height", "fps")}
    assert facts == {"type": "video", "bytes": len(MP4), "width": 64, "height": 32, "fps": 25.0}
    assert answer["duration"] == pytest.approx(0.4)
    found = keeping.http.get(f"/v1/media/{answer['id']}").json()
    assert {**found, "expires_at": 0} == {**answer, "expires_at": 0}


def test_the_content_tells_what_it_is(keeping: RunningGateway) -> None:
    assert upload(keeping, MP4, "image/png")["type"] == "video"
    assert upload(keeping, PNG, "video/mp4")["type"] == "image"


def test_the_same_bytes_are_one_file(keeping: RunningGateway, media_dir: Path) -> None:
    first = upload(keeping, PNG)
    second = keeping.http.post("/v1/media", files={"file": ("other.jpg", PNG)}).json()

    assert first["id"] == second["id"]
    assert [path.name for path in media_dir.iterdir()] == [first["id"]]


def test_an_upload_goes_wherever_a_url_does(keeping: RunningGateway) -> None:
    image, clip = (f"media://{upload(keeping, data)['id']}" for data in (PNG, MP4))
    asked = keeping.engine.requests
    content = [{"type": "image_url", "image_url": {"url": image}}, text_part("What?")]

    for response in (
        keeping.http.post("/v1/point", json={"image_url": image, "object": "x"}),
        keeping.http.post("/v1/count", json={"images": [image, image], "object": "x"}),
        keeping.chat(content),
    ):
        assert response.status_code == 200
        sent = asked[-1]["messages"][0]["content"][0]
        assert sent == {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    tracked = keeping.http.post("/v1/track", json={"video_url": clip, "object": "x"})
    assert [frame["index"] for frame in tracked.json()["frames"]] == [0, 9]
    sent = asked[-1]["messages"][0]["content"][0]
    assert sent == {"type": "video_url", "video_url": {"url": data_url(MP4, "video/mp4")}}


def test_a_deleted_file(keeping: RunningGateway, media_dir: Path) -> None:
    media_id = upload(keeping, PNG)["id"]

    deleted = keeping.http.delete(f"/v1/media/{media_id}")

    assert deleted.json() == {"id": media_id, "object": "media", "deleted": True}
    assert list(media_dir.iterdir()) == []
    for response in (
        keeping.http.get(f"/v1/media/{media_id}"),
        keeping.http.delete(f"/v1/media/{media_id}"),
        keeping.http.post("/v1/point", json={"image_url": f"media://{media_id}", "object": "x"}),
    ):
        error = assert_refused(keeping, response, "upload it with POST /v1/media", 404)
        assert error["code"] == "media_not_found"


def test_a_file_deleted_under_a_running_request(keeping: RunningGateway) -> None:
    url = f"media://{upload(keeping, PNG)['id']}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        text_part(f"{Trick.SLOW} {Trick.BREAK_FIRST} what?"),
    ]
    body = {"messages": [{"role": "user", "content": content}], "stream": True}

    with keeping.http.stream("POST", "/v1/chat/completions", json=body) as response:
        keeping.http.delete(f"/v1/media/{url.removeprefix('media://')}")
        stream = response.read()

    assert stream.endswith(b"data: [DONE]\n\n")
    assert b'"grounding"' in stream


def test_an_upload_of_the_other_kind(keeping: RunningGateway) -> None:
    image, clip = (f"media://{upload(keeping, data)['id']}" for data in (PNG, MP4))

    for fields, says in (
        ({"image_url": clip}, "image 1 is not a picture"),
        ({"video_url": image}, "the video is not mp4, mov, webm or mkv"),
    ):
        response = keeping.http.post("/v1/point", json={**fields, "object": "x"})
        assert assert_refused(keeping, response, says)["code"] == "invalid_media"


def test_every_way_to_the_same_bytes_is_one_look(keeping: RunningGateway) -> None:
    clip = video(n_frames=13)
    before = sample(keeping, HITS)
    url = f"media://{upload(keeping, clip)['id']}"
    assert sample(keeping, HITS) == before

    for way in (url, data_url(clip, "video/mp4"), data_url(clip, "video/quicktime")):
        asked = keeping.http.post("/v1/track", json={"video_url": way, "object": "x"})
        assert asked.status_code == 200
    assert sample(keeping, HITS) == before + 3


async def test_a_second_question_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [data_url(video(n_frames=n), "video/mp4") for n in (3, 4, 5)]
    gate = MediaGate(MolmoSettings(media_cache_entries=2))
    for url in (clips[0], clips[1], clips[0], clips[2]):  # the second one is forgotten
        await gate.check([], [url])

    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    for url, n_frames in ((clips[0], 3), (clips[2], 5)):
        video_of = (await gate.check([], [url])).video
        assert video_of is not None
        assert video_of.info.n_frames == n_frames
    with pytest.raises(FileNotFoundError):
        await gate.check([], [clips[1]])


async def test_a_refused_file_is_looked_at_again() -> None:
    known: list[None] = []
    gate = MediaGate(MolmoSettings(), on_known=lambda: known.append(None))
    for _ in range(2):
        with pytest.raises(InvalidMedia, match="not a picture"):
            await gate.check([data_url(b"x")], [])
    assert known == []


async def test_many_uploads_at_once_above_the_quota(tmp_path: Path) -> None:
    """Every one is kept or made room for another; what is there is whole and counted."""
    pictures = [picture(20 + k, 20) for k in range(12)]
    quota = 3 * max(map(len, pictures))
    settings = MolmoSettings(media_dir=tmp_path / "media", media_quota_bytes=quota)
    spool = Spool(settings)
    spool.start()
    gate = MediaGate(settings, spool=spool)

    answers = await asyncio.gather(*(gate.keep(data) for data in [*pictures, *pictures]))

    kept = {path.name: path.read_bytes() for path in (tmp_path / "media").iterdir()}
    assert {answer.id for answer in answers} >= set(kept)
    assert all(f"media-{hashlib.sha256(d).hexdigest()[:32]}" == n for n, d in kept.items())
    assert 0 < spool.n_bytes == sum(map(len, kept.values())) <= quota
    [url] = [f"media://{name}" for name in list(kept)[:1]]
    [image] = (await gate.check([url], [])).images
    assert (
        base64.b64decode(image.file.data_url().partition(",")[2])
        == kept[url.removeprefix("media://")]
    )
    spool.close()


def test_without_a_folder_uploads_end_with_the_service(folder: Path, tmp_path: Path) -> None:
    with running_gateway(folder, tmp_path) as gateway:
        media_id = upload(gateway, PNG)["id"]
        assert gateway.http.get(f"/v1/media/{media_id}").status_code == 200
    with running_gateway(folder, tmp_path) as gateway:
        missing = gateway.http.get(f"/v1/media/{media_id}")
        assert error_of(missing)["code"] == "media_not_found"


def test_with_a_folder_uploads_outlast_the_service(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with running_gateway(folder, tmp_path, media_dir=kept) as gateway:
        media_id = upload(gateway, PNG)["id"]
    with running_gateway(folder, tmp_path, media_dir=kept) as gateway:
        assert gateway.http.get(f"/v1/media/{media_id}").json()["width"] == 64
