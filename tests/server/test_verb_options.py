"""Options of the verbs: how many points, several objects, a region, rates, given points."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from typing import Any

import pytest
from PIL import Image

from molmo_core import api
from molmo_core.points.grammar import tracks_grammar
from tests.server.media import data_url, picture, video
from tests.support.gateway import RunningGateway, assert_refused

PNG, MP4 = data_url(picture()), data_url(video(), "video/mp4")
STARS = '<points coords="1 1 100 100 2 500 500 3 900 900">stars</points>'
TRACKS = '<tracks coords="0.0 1 100 200 2 500 500;0.5 1 150 200">dog</tracks>'


def post(gateway: RunningGateway, verb: str, **body: Any) -> dict[str, Any]:
    response = gateway.http.post(f"/v1/{verb}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def questions(gateway: RunningGateway) -> list[str]:
    return [body["messages"][0]["content"][-1]["text"] for body in gateway.engine.requests]


# --- max_points -------------------------------------------------------------------------------


def test_points_beyond_the_most_are_left_out_with_a_warning(gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = STARS

    answer = post(gateway, "point", image_url=PNG, object="stars", max_points=2)

    assert [point["id"] for point in answer["points"]] == [1, 2]
    assert (answer["count"], answer["status"]) == (2, "found")
    [warning] = answer["warnings"]
    assert warning["code"] == "over_max_points"
    assert warning["message"] == "3 were pointed at, the first 2 are kept"
    assert STARS[slice(*warning["span"])] == "3 900 900"
    assert answer["text"] == STARS
    assert post(gateway, "count", image_url=PNG, object="stars", max_points=2)["count"] == 2


def test_tracks_beyond_the_most_are_left_out(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = TRACKS

    answer = post(gateway, "track", video_url=MP4, object="dog", max_points=1)

    assert [(track["id"], len(track["points"])) for track in answer["tracks"]] == [(1, 2)]
    assert [warning["code"] for warning in answer["warnings"]] == ["over_max_points"]


def test_an_answer_within_the_most_is_as_it_is(gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = STARS
    asked = {"image_url": PNG, "object": "stars"}

    bounded = post(gateway, "point", **asked, max_points=3)

    assert (bounded["warnings"], bounded["count"]) == ([], 3)


# --- several objects --------------------------------------------------------------------------


def test_each_object_is_asked_about_the_same_media(gateway: RunningGateway) -> None:
    gateway.engine.script |= {"stars": STARS, "cats": "There are none.", "dogs": "Dogs?"}

    answer = api.PointAnswer.model_validate(
        post(gateway, "point", image_url=PNG, objects=["stars", "cats", "dogs", "circles"])
    )

    assert sorted(questions(gateway)[1:]) == [
        "Point to cats.", "Point to circles.", "Point to dogs."
    ]  # fmt: skip
    assert questions(gateway)[0] == "Point to stars."
    media = [body["messages"][0]["content"][0] for body in gateway.engine.requests]
    assert media == [media[0]] * 4
    assert answer.objects is not None
    assert [(one.object, one.status, one.count) for one in answer.objects] == [
        ("stars", "found", 3),
        ("cats", "none", 0),
        ("dogs", "unreadable", 0),
        ("circles", "found", 1),
    ]
    assert (answer.count, len(answer.points), answer.status) == (4, 4, "found")
    assert [answer.text[slice(*p.span)].split()[0] for p in answer.points] == ["1", "2", "3", "1"]
    for one in answer.objects:
        assert all(one.text[slice(*p.span)].split()[0] == str(p.id) for p in one.points)
    assert answer.text == "\n".join(one.text for one in answer.objects)
    assert answer.usage.completion_tokens == sum(-(-len(o.text) // 4) for o in answer.objects)
    alone = post(gateway, "point", image_url=PNG, object="stars")["usage"]
    assert answer.usage.prompt_tokens_details is not None
    n_of_one = alone["prompt_tokens_details"]["image_tokens"]
    assert answer.usage.prompt_tokens_details.image_tokens == 4 * n_of_one


def test_counts_and_tracks_of_several_objects(gateway: RunningGateway) -> None:
    gateway.engine.script |= {"stars": STARS, "cats": "7", "dogs": TRACKS, "x": "?"}

    counted = post(gateway, "count", image_url=PNG, objects=["stars", "cats"])
    assert (counted["count"], [o["count"] for o in counted["objects"]]) == (10, [3, 7])
    unknown = post(gateway, "count", image_url=PNG, objects=["stars", "x"])
    assert (unknown["count"], [o["count"] for o in unknown["objects"]]) == (None, [3, None])
    tracked = post(gateway, "track", video_url=MP4, objects=["dogs", "dogs"])
    assert (tracked["count"], len(tracked["tracks"])) == (4, 4)
    assert [len(one["tracks"]) for one in tracked["objects"]] == [2, 2]


def test_one_object_in_a_list_is_grouped_too(gateway: RunningGateway) -> None:
    answer = post(gateway, "point", image_url=PNG, objects=["circles"])

    assert [one["object"] for one in answer["objects"]] == ["circles"]
    assert "objects" not in post(gateway, "point", image_url=PNG, object="circles")


def test_a_failure_about_one_object_is_that_of_the_request(gateway: RunningGateway) -> None:
    asked = {"image_url": PNG, "objects": ["stars", "x [500]", "y"]}
    failed = gateway.http.post("/v1/point", json=asked)
    assert (failed.status_code, failed.json()["error"]["code"]) == (502, "engine_failed")


def test_several_objects_in_a_form(gateway: RunningGateway) -> None:
    fields = {"objects": '["stars", "cats"]', "region": '{"x0":0,"y0":0,"x1":0.5,"y1":1}'}
    files = {"image": ("a.png", picture())}

    answer = gateway.http.post("/v1/point", data=fields, files=files).json()
    assert [one["object"] for one in answer["objects"]] == ["stars", "cats"]
    refused = gateway.http.post("/v1/point", data={"objects": "stars"}, files=files)
    assert "the field 'objects' is not JSON" in refused.json()["error"]["message"]


# --- region -----------------------------------------------------------------------------------


def sent_picture(gateway: RunningGateway) -> Image.Image:
    url = gateway.engine.requests[-1]["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_region_is_looked_at_alone_and_answered_in_the_whole(
    gateway: RunningGateway, orientation: int
) -> None:
    gateway.engine.script["stars"] = STARS
    url = data_url(picture(80, 40, "JPEG", orientation=orientation), "image/jpeg")
    width, height = (40, 80) if orientation == 6 else (80, 40)
    region = {"x0": 0.5, "y0": 0.25, "x1": 1, "y1": 0.75}

    answer = post(gateway, "point", image_url=url, object="stars", region=region)

    assert sent_picture(gateway).size == (width // 2, height // 2)
    assert answer["media"] == [{"index": 0, "type": "image", "width": width, "height": height}]
    assert [(p["x"], p["y"]) for p in answer["points"]] == [
        (0.55, 0.3), (0.75, 0.5), (0.95, 0.7)
    ]  # fmt: skip
    assert answer["points"][0]["pixel"] == {"x": 0.55 * width, "y": 0.3 * height}


def test_a_regions_pixels_are_those_of_the_picture(gateway: RunningGateway) -> None:
    whole = Image.open(io.BytesIO(picture(64, 48)))
    region = {"x0": 0.1, "y0": 0.5, "x1": 0.3, "y1": 0.9}

    post(gateway, "query", image_url=PNG, question="What is it?", region=region)

    assert sent_picture(gateway).tobytes() == whole.crop((6, 24, 20, 44)).tobytes()


def test_a_region_of_a_large_picture(gateway: RunningGateway) -> None:
    picture = Image.new("L", (4100, 4000))
    picture.putpixel((2050, 0), 255)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    region = {"x0": 0.5, "y0": 0, "x1": 0.51, "y1": 0.01}

    answer = post(
        gateway, "point", image_url=data_url(buffer.getvalue()), object="x", region=region
    )

    assert sent_picture(gateway).size == (41, 40)
    assert sent_picture(gateway).getpixel((0, 0)) == 255
    assert answer["points"][0]["x"] == pytest.approx(0.5025)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"image_url": PNG, "region": {"x0": 0.5, "y0": 0, "x1": 0.5, "y1": 1}}, "x0 must be left"),
        ({"image_url": PNG, "region": {"x0": 0, "y0": 0, "x1": 2, "y1": 1}}, "less than or equal"),
        ({"image_url": PNG, "region": {"x0": 0, "y0": 0, "x1": 1}}, "this field is missing"),
        ({"image_url": PNG, "region": {"x0": 0, "y0": 0, "x1": 0.01, "y1": 1}}, "region is 1x48"),
        ({"images": [PNG, PNG], "region": {"x0": 0, "y0": 0, "x1": 1, "y1": 1}}, "2 pictures"),
        ({"video_url": MP4, "region": {"x0": 0, "y0": 0, "x1": 1, "y1": 1}}, "a video"),
        ({"image_url": PNG, "objects": ["a"], "object": "a"}, "got both of them"),
        ({"image_url": PNG, "object": None}, "got neither; send exactly one of object and objects"),
        ({"image_url": PNG, "object": None, "objects": []}, "at least 1 item"),
        ({"image_url": PNG, "object": None, "objects": ["a"] * 9}, "got 9 objects, allowed are 8"),
        ({"image_url": PNG, "max_points": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense(
    gateway: RunningGateway, body: dict[str, Any], says: str
) -> None:
    sent = {k: v for k, v in ({"object": "x"} | body).items() if v is not None}
    assert_refused(gateway, gateway.http.post("/v1/point", json=sent), says)


# --- tracks -----------------------------------------------------------------------------------


def test_a_rate_is_asked_for_as_in_training(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = TRACKS

    post(gateway, "track", video_url=MP4, object="the dog", frame_rate=1)

    assert questions(gateway) == ["Track the dog in 1 FPS"]
    grammar = gateway.engine.requests[-1]["structured_outputs"]["grammar"]
    assert grammar == tracks_grammar([0, 1, 2])


def test_a_track_goes_on_from_a_given_point(gateway: RunningGateway) -> None:
    gateway.engine.script["312 455"] = '<tracks coords="1.0 1 100 200;1.5 1 150 200">dog</tracks>'
    gateway.engine.script["500 600"] = '<tracks coords="2.0 1 300 300">dog</tracks>'
    points = [{"t": 0.5, "x": 0.312, "y": 0.455}, {"t": 1.5, "x": 0.5, "y": 0.6}]

    answer = post(gateway, "track", video_url=MP4, object="red car", points=points)

    assert questions(gateway) == [
        "video_single_point_track_per_frame: "
        'Track <points coords="0.5 1 312 455">red car</points> in 2 FPS.',
        "video_single_point_track_per_frame: "
        'Track <points coords="1.5 1 500 600">red car</points> in 2 FPS.',
    ]
    grammars = [body["structured_outputs"]["grammar"] for body in gateway.engine.requests]
    assert grammars == [
        tracks_grammar([1, 1.5, 2], max_objects=1),
        tracks_grammar([2], max_objects=1),
    ]
    assert [(t["id"], [p["t"] for p in t["points"]]) for t in answer["tracks"]] == [
        (1, [1.0, 1.5]), (2, [2.0])
    ]  # fmt: skip
    assert (answer["count"], "objects" in answer) == (2, False)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"frame_rate": 5}, "2 frames a second of this video are looked at"),
        ({"frame_rate": 5, "constrained": False}, "2 frames a second of this video are looked at"),
        ({"frame_rate": 0}, "greater than 0"),
        ({"points": [{"t": 2, "x": 0, "y": 0}]}, "the last frame that is looked at is at 2.0 s"),
        ({"points": [{"t": 0, "x": 0, "y": 7}]}, "less than or equal to 1"),
        ({"points": []}, "at least 1 item"),
        ({"points": [{"t": 0, "x": 0, "y": 0}] * 9}, "got 9 points, allowed are 8"),
        ({"points": [{"t": 0, "x": 0, "y": 0}], "objects": ["a"]}, "points go with one object"),
        ({"interpolate": -1}, "greater than 0"),
    ],
)
def test_tracks_that_make_no_sense(
    gateway: RunningGateway, body: dict[str, Any], says: str
) -> None:
    named = {} if "objects" in body else {"object": "x"}
    response = gateway.http.post("/v1/track", json={"video_url": MP4, **named, **body})
    assert_refused(gateway, response, says)


def test_places_between_observations(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = (
        '<tracks coords="0.0 1 100 200;0.5 1 200 400;1.5 1 300 300;2.0 1 300 300">dog</tracks>'
    )

    answer = post(gateway, "track", video_url=MP4, object="dog", interpolate=4)

    [track] = answer["tracks"]
    seen = [(p["t"], p["x"], p["y"], p.get("interpolated", False)) for p in track["points"]]
    assert seen == [
        (0.0, 0.1, 0.2, False),
        (0.25, 0.15, 0.3, True),
        (0.5, 0.2, 0.4, False),
        (1.5, 0.3, 0.3, False),
        (1.75, 0.3, 0.3, True),
        (2.0, 0.3, 0.3, False),
    ]
    every_frame = post(gateway, "track", video_url=MP4, object="dog", interpolate=True)
    n_frames = sum(p.get("interpolated", False) for p in every_frame["tracks"][0]["points"])
    assert n_frames == 12 + 12
    coarse = post(gateway, "track", video_url=MP4, object="dog", interpolate=2)
    assert coarse == {**answer, "tracks": coarse["tracks"], "request_id": coarse["request_id"]}
    assert not any(p.get("interpolated") for p in coarse["tracks"][0]["points"])


def test_at_a_lower_rate_only_its_moments_are_gaps(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = '<tracks coords="0.0 1 100 200;1.0 1 200 400">dog</tracks>'

    asked = {"video_url": MP4, "object": "dog", "interpolate": 2}
    [gap] = post(gateway, "track", **asked)["tracks"]
    [track] = post(gateway, "track", **asked, frame_rate=1)["tracks"]

    assert [p["t"] for p in gap["points"]] == [0, 1]
    assert [p["t"] for p in track["points"]] == [0, 0.5, 1]


def test_a_part_of_a_video_has_the_times_of_the_file(gateway: RunningGateway) -> None:
    gateway.engine.script["dog"] = '<tracks coords="0.0 1 100 200;0.5 1 200 400">dog</tracks>'
    part = {"video_url": MP4, "object": "dog", "media_options": {"start": 1}}

    [track] = post(gateway, "track", **part, interpolate=4)["tracks"]
    assert [p["t"] for p in track["points"]] == [1, 1.25, 1.5]
    post(gateway, "track", **part, points=[{"t": 1, "x": 0.1, "y": 0.2}])
    assert '<points coords="0.0 1 100 200">' in questions(gateway)[-1]
    grammar = gateway.engine.requests[-1]["structured_outputs"]["grammar"]
    assert grammar == tracks_grammar([0.5, 1], max_objects=1)


def test_documented_forms_have_the_fields(gateway: RunningGateway) -> None:
    document = json.loads(gateway.http.get("/openapi.json").content)
    schemas = document["components"]["schemas"]
    assert {"max_points", "confidence", "region", "stream"} <= set(
        schemas["PointRequest"]["properties"]
    )
    assert {"frame_rate", "interpolate", "points"} <= set(schemas["TrackRequest"]["properties"])
    assert {"Region", "GivenPoint", "OneObject"} <= set(schemas)
