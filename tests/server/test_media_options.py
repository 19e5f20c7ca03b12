"""`media_options`: what reaches the engine, what is counted, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo_client import Client
from molmo_core.errors import InvalidRequest
from molmo_server.engine_pool.fake import FakeEngine, question_of
from tests.server.media import data_url, image_part, picture, text_part, video, video_part
from tests.support.gateway import RunningGateway, assert_refused, running_gateway

PNG = picture(200, 150)
MP4 = video(n_frames=100)  # 4 s at 25 a second
ALL: dict[str, Any] = {"max_frames": 3, "fps": 4.0, "start": 1.0, "end": 3.5}


def video_fields(**fields: Any) -> dict[str, Any]:
    return {"video_url": data_url(MP4, "video/mp4"), **fields}


def test_options_reach_the_engine_under_its_own_names(gateway: RunningGateway) -> None:
    asked = gateway.engine.requests
    crops = {"image_url": data_url(PNG), "object": "x", "media_options": {"max_crops": 3}}
    for path, fields in (
        ("/v1/point", crops),
        ("/v1/track", video_fields(object="x", media_options=ALL)),
        ("/v1/caption", video_fields(media_options={"fps": 1})),
        ("/v1/caption", video_fields()),
    ):
        response = gateway.http.post(path, json=fields)
        assert response.status_code == 200, response.text
    gateway.chat([video_part(MP4), text_part("?")], media_options=ALL, stream=True)

    names = ("mm_processor_kwargs", "media_io_kwargs")
    sent = [{name: body[name] for name in names if name in body} for body in asked]
    part = {"num_frames": 3, "asked_fps": 4.0, "start_s": 1.0, "end_s": 3.5}
    assert sent == [
        {"mm_processor_kwargs": {"max_crops": 3}},
        {"media_io_kwargs": {"video": part}},
        {"media_io_kwargs": {"video": {"asked_fps": 1.0}}},
        {},
        {"media_io_kwargs": {"video": part}},
    ]
    assert not any("media_options" in body for body in asked)


def test_forms_send_them_as_text(gateway: RunningGateway) -> None:
    fields = {"object": "x", "media_options": '{"max_crops": 2}'}
    files = {"image": ("a.png", PNG)}
    assert gateway.http.post("/v1/point", data=fields, files=files).status_code == 200
    assert gateway.engine.requests[-1]["mm_processor_kwargs"] == {"max_crops": 2}
    bad = gateway.http.post("/v1/point", data=fields | {"media_options": "many"}, files=files)
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "media_options")


def test_times_of_a_part_are_those_of_the_file(gateway: RunningGateway) -> None:
    """The model is told a clip that begins at 0, as in training, and answers so."""
    gateway.engine.script["the ball"] = '<tracks coords="0.5 1 250 500;1.0 1 300 500">ball</tracks>'
    fields = video_fields(object="the ball", media_options={"fps": 2, "start": 1.5, "end": 3.0})
    answer = gateway.http.post("/v1/track", json=fields).json()
    assert [frame["time"] for frame in answer["frames"]] == [1.5, 2.0, 2.5, 3.0]
    points = answer["tracks"][0]["points"]
    assert [(point["t"], point["frame"]) for point in points] == [(2.0, 50), (2.5, 62)]

    gateway.engine.script["Where"] = '<points coords="1.5 1 250 500">ball</points>'
    chat = gateway.chat(
        [video_part(MP4), text_part("Where")], media_options={"start": 1.5, "end": 3.0}
    ).json()
    message = chat["choices"][0]["message"]
    assert message["content"].startswith('<points coords="1.5 '), "what the model wrote"
    assert [point["t"] for point in message["grounding"]["points"]] == [3.0]


def test_frames_that_are_asked_for_are_counted(gateway: RunningGateway) -> None:
    """The context of this server has 4096 tokens; a frame has 4 and its time."""
    fields = video_fields(media_options={"fps": 30, "max_frames": 384})
    assert gateway.http.post("/v1/caption", json=fields).status_code == 200
    frames = gateway.http.post("/v1/caption", json=fields).json()["frames"]
    assert len(frames) == 121  # every 1/30 of 4 s, and the end
    few = gateway.http.post("/v1/caption", json=video_fields(media_options={"max_frames": 1}))
    assert [frame["time"] for frame in few.json()["frames"]] == [0.0]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_crops": 0}, "media_options.max_crops"),
        ({"max_crops": 25}, "media_options.max_crops"),
        ({"max_crops": 2.0}, "media_options.max_crops"),
        ({"max_frames": 0}, "media_options.max_frames"),
        ({"max_frames": 385}, "media_options.max_frames"),
        ({"fps": 0}, "media_options.fps"),
        ({"fps": 31}, "media_options.fps"),
        ({"fps": "two"}, "media_options.fps"),
        ({"start": -1}, "media_options.start"),
        ({"start": 2, "end": 2}, "media_options"),
        ({"end": 0}, "media_options"),
        ({"start": 4.0}, "media_options"),
        ({"frames": 3}, "media_options.frames"),
        ({"max_crops": 3}, "media_options.max_crops"),  # of pictures, and this is a video
    ],
)
def test_what_is_refused(gateway: RunningGateway, options: dict[str, Any], param: str) -> None:
    response = gateway.http.post("/v1/caption", json=video_fields(media_options=options))
    error = assert_refused(gateway, response, says="")
    assert error["param"] == param


def test_raw_fields_of_the_engine_are_nobodys(gateway: RunningGateway) -> None:
    for name, value in (
        ("mm_processor_kwargs", {"max_crops": 3}),
        ("media_io_kwargs", {"video": {"num_frames": 3}}),
        ("cache_salt", "mine"),
    ):
        response = gateway.chat([image_part(PNG), text_part("?")], **{name: value})
        assert (
            assert_refused(gateway, response, says="unknown field")["code"] == "unknown_parameter"
        )
    files = gateway.chat(
        [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, text_part("?")]
    )
    assert_refused(gateway, files, says="")


@pytest.fixture(scope="module")
def others(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Before an engine that is not one of ours."""
    engine = FakeEngine(takes_media_options=False)
    with running_gateway(folder, tmp_path_factory.mktemp("sockets"), engine) as gateway:
        yield gateway


def test_an_engine_of_others_knows_no_options(others: RunningGateway) -> None:
    others.engine.requests.clear()
    plain = {"image_url": data_url(PNG), "object": "x"}
    response = others.http.post("/v1/point", json=plain | {"media_options": {"max_crops": 3}})
    assert assert_refused(others, response, says="not one of ours")["param"] == "media_options"
    assert others.http.post("/v1/point", json=plain).status_code == 200


def test_the_client_sends_them(gateway: RunningGateway) -> None:
    with Client(gateway.url) as client:
        client.point(PNG, "x", media_options={"max_crops": 5})
        with pytest.raises(InvalidRequest, match="max_crops"):
            client.point(PNG, "x", media_options={"max_crops": 99})
    assert gateway.engine.requests[-1]["mm_processor_kwargs"] == {"max_crops": 5}


def test_the_command_sends_them(
    gateway: RunningGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from molmo_client.asking import Options, caption

    path = tmp_path / "clip.mp4"
    path.write_bytes(MP4)
    options = Options(server=gateway.url, json=True, max_frames=2, fps=1.0, start=1.0, end=3.0)
    caption(path, options=options)
    assert [frame["time"] for frame in json.loads(capsys.readouterr().out)["frames"]] == [1.0, 3.0]


def test_points_that_are_given_are_those_of_the_file(gateway: RunningGateway) -> None:
    gateway.engine.script["the ball"] = '<tracks coords="1.0 1 300 500">the ball</tracks>'
    fields = video_fields(object="the ball", media_options={"fps": 2, "start": 1.5, "end": 3.5})
    given = [{"t": 2.0, "x": 0.25, "y": 0.5}]
    response = gateway.http.post("/v1/track", json=fields | {"points": given})
    assert response.status_code == 200, response.text
    question = question_of(gateway.engine.requests[-1])
    assert "0.5 1 250 500" in question, "as the model is told, half a second into the part"
    [track] = response.json()["tracks"]
    assert [point["t"] for point in track["points"]] == [2.5]

    early = gateway.http.post("/v1/track", json=fields | {"points": [{"t": 1.0, "x": 0, "y": 0}]})
    assert (early.status_code, early.json()["error"]["param"]) == (400, "points")
    late = gateway.http.post("/v1/track", json=fields | {"points": [{"t": 3.5, "x": 0, "y": 0}]})
    assert "the last frame that is looked at is at 3.5 s" in late.json()["error"]["message"]


def test_places_in_a_stream_are_those_of_the_file(gateway: RunningGateway) -> None:
    gateway.engine.script["the dog"] = '<tracks coords="0.5 1 250 500;1.0 1 300 500">dog</tracks>'
    fields = video_fields(object="the dog", stream=True, media_options={"start": 1.5})
    with gateway.http.stream("POST", "/v1/track", json=fields) as response:
        text = response.read().decode()
    assert '"t":2.0' in text
    assert '"t":2.5' in text
    assert '"t":0.5' not in text
