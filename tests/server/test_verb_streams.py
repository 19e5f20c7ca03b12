"""Verbs as streams: each place as an event, then the whole answer, and streams that break."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from molmo_core import api
from tests.server.media import data_url, picture, video
from tests.support.gateway import RunningGateway, assert_refused, events_of

PNG, MP4 = data_url(picture()), data_url(video(), "video/mp4")
STARS = '<points coords="1 1 100 100 2 500 500 3 900 900">stars</points>'
TRACKS = '<tracks coords="0.0 1 100 200 2 500 500;0.5 1 150 200">dog</tracks>'


def stream(gateway: RunningGateway, verb: str, **body: Any) -> list[Any]:
    response = gateway.http.post(f"/v1/{verb}", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(response.content)


def whole(gateway: RunningGateway, verb: str, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = gateway.http.post(f"/v1/{verb}", json=body).json()
    return answer


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    """But for what each request has of its own, and what a stream's engine counts."""
    return {k: v for k, v in answer.items() if k != "request_id"}


@pytest.mark.parametrize(
    ("verb", "body", "script", "n_places"),
    [
        ("point", {"image_url": PNG}, STARS, 3),
        ("count", {"image_url": PNG}, f"Counting the {STARS} shows a total of 3.", 3),
        ("track", {"video_url": MP4}, TRACKS, 3),
        ("track", {"video_url": MP4, "interpolate": 10}, TRACKS, 3),
        ("point", {"image_url": PNG, "max_points": 2}, STARS, 2),
        ("point", {"image_url": PNG, "max_tokens": 11}, STARS, 2),
        ("point", {"image_url": PNG}, "There are none.", 0),
    ],
)
def test_a_stream_ends_with_the_whole_answer(
    gateway: RunningGateway, verb: str, body: dict[str, Any], script: str, n_places: int
) -> None:
    gateway.engine.script["stars"] = script

    *added, done = stream(gateway, verb, object="stars", **body)

    assert [event["op"] for event in added] == ["add"] * n_places
    assert done["op"] == "done"
    assert without_id(done["answer"]) == without_id(whole(gateway, verb, object="stars", **body))
    text = done["answer"]["text"]
    for event in added:
        item = api.Observation.model_validate(event["item"])
        assert text[slice(*item.span)].split()[0] == str(item.id)
        assert item.kind == ("track" if verb == "track" else "point")
        assert (item.t is not None) == (verb == "track")


def test_a_cut_answer_has_every_whole_point(gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = STARS
    for n_tokens in range(1, 17):
        text = STARS[: 4 * n_tokens]
        n_whole = sum(
            text.find(t) + len(t) <= len(text)
            for t in ("100 100", "500 500", "900 900")
            if t in text
        )
        body = {"image_url": PNG, "object": "stars", "max_tokens": n_tokens}

        answer = whole(gateway, "point", **body)
        *added, done = stream(gateway, "point", **body)

        assert len(answer["points"]) == len(added) == n_whole
        assert without_id(done["answer"]) == without_id(answer)


def test_a_region_in_a_stream(gateway: RunningGateway) -> None:
    region = {"x0": 0.5, "y0": 0, "x1": 1, "y1": 0.5}

    added, done = stream(gateway, "point", image_url=PNG, object="x", region=region)

    [point] = done["answer"]["points"]
    assert (added["item"]["x"], added["item"]["y"]) == (point["x"], point["y"]) == (0.625, 0.25)


def test_several_objects_come_one_after_the_other(gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = STARS
    asked = {"image_url": PNG, "objects": ["stars", "circles"]}

    *added, done = stream(gateway, "point", **asked)

    assert [event["item"]["object"] for event in added] == ["stars"] * 3 + ["circles"]
    assert without_id(done["answer"]) == without_id(whole(gateway, "point", **asked))
    ids = [
        body["messages"][0]["content"][0]["image_url"]["url"] for body in gateway.engine.requests
    ]
    assert len(set(ids)) == 1


def test_tracks_that_go_on_have_the_number_of_their_point(gateway: RunningGateway) -> None:
    gateway.engine.script["Track"] = '<tracks coords="1.0 1 100 200">dog</tracks>'
    points = [{"t": 0, "x": 0, "y": 0}, {"t": 0.5, "x": 1, "y": 1}]

    *added, done = stream(gateway, "track", video_url=MP4, object="dog", points=points)

    assert [event["item"]["id"] for event in added] == [1, 2]
    assert [track["id"] for track in done["answer"]["tracks"]] == [1, 2]


@pytest.mark.parametrize("word", ["[break]", "[error event]"])
def test_a_stream_that_breaks_ends_with_an_error(gateway: RunningGateway, word: str) -> None:
    gateway.engine.script["stars"] = STARS * 3

    response = gateway.http.post(
        "/v1/point", json={"image_url": PNG, "object": f"stars {word}", "stream": True}
    )

    *added, failure = events_of(response.content)
    assert response.status_code == 200
    assert [event["op"] for event in added] == ["add"] * len(added)
    assert failure["error"]["code"] in ("engine_failed", "engine_unavailable")


def test_what_is_wrong_before_the_first_byte_has_a_status(gateway: RunningGateway) -> None:
    refused = gateway.http.post("/v1/point", json={"image_url": PNG, "stream": True})
    assert_refused(gateway, refused, "send exactly one of object and objects")
    failed = gateway.http.post(
        "/v1/point", json={"image_url": PNG, "object": "[500]", "stream": True}
    )
    assert failed.status_code == 502
    assert orjson.loads(failed.content)["error"]["code"] == "engine_failed"
