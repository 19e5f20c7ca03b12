"""The verbs over real sockets: JSON and forms, images and videos, and the shapes of answers."""

from __future__ import annotations

import pytest

from molmo_core import api
from tests.server.media import data_url, picture, video
from tests.support.gateway import RunningGateway

NONE_TEXT = "There are none."
PNG, MP4 = data_url(picture()), data_url(video(), "video/mp4")
TRACKS = '<tracks coords="0.0 1 100 200 2 500 500;0.5 1 150 200">dog</tracks>'


def sent_text(gateway: RunningGateway) -> str:
    """The question that the engine got last."""
    text: str = gateway.engine.requests[-1]["messages"][0]["content"][-1]["text"]
    return text


def test_point_has_the_shape_of_moondream_and_more(gateway: RunningGateway) -> None:
    response = gateway.http.post(
        "/v1/point", json={"image_url": PNG, "object": "the red circle", "max_tokens": 99}
    )

    answer = response.json()
    start = gateway.engine.default.index("1 250 500")
    assert response.status_code == 200
    assert answer.pop("request_id") == response.headers["x-request-id"]
    assert answer.pop("checkpoint") == response.headers["x-molmo-checkpoint"]
    assert answer == {
        "text": gateway.engine.default,
        "finish_reason": "stop",
        "media": [{"index": 0, "type": "image", "width": 64, "height": 48}],
        "frames": [],
        "warnings": [],
        "usage": {
            **{"prompt_tokens": 5, "completion_tokens": 21, "total_tokens": 26},
            "prompt_tokens_details": {
                **{"cached_tokens": None, "image_tokens": 12, "video_tokens": None}
            },
        },
        "points": [
            {
                "x": 0.25,
                "y": 0.5,
                "pixel": {"x": 16.0, "y": 24.0},
                "id": 1,
                "label": "red circle",
                "media_index": 0,
                "span": [start, start + len("1 250 500")],
            }
        ],
        "count": 1,
        "found": True,
        "status": "found",
    }
    [request] = gateway.engine.requests
    assert request.pop("structured_outputs")["grammar"].startswith("root ::= ")
    assert [request] == [
        {
            "model": "molmo2",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": PNG}},
                        {"type": "text", "text": "Point to the red circle."},
                    ],
                }
            ],
            "max_tokens": 99,
            "temperature": 0.0,
        }
    ]


def test_several_images_in_one_question(gateway: RunningGateway) -> None:
    gateway.engine.script["stars"] = '<points coords="1 1 250 500;2 2 500 250">stars</points>'
    urls = [PNG, data_url(picture(100, 200))]

    answer = gateway.http.post("/v1/point", json={"images": urls, "object": "stars"}).json()

    assert [(p["media_index"], p["pixel"]["y"]) for p in answer["points"]] == [(0, 24.0), (1, 50.0)]
    assert sent_text(gateway) == "Point to stars in all images."


def test_point_in_a_video_has_times_and_frames(gateway: RunningGateway) -> None:
    gateway.engine.script["in the video"] = '<points coords="0.5 1 250 500">dog</points>'

    answer = gateway.http.post("/v1/point", json={"video_url": MP4, "object": "dogs"}).json()

    [point] = answer["points"]
    assert (point["t"], point["frame"], point["media_index"]) == (0.5, 12, 0)
    assert [f["time"] for f in answer["frames"]] == [0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("text", "count", "status"),
    [
        (
            'Counting the <points coords="1 1 250 500 2 300 500">x</points> shows a total of 2.',
            2,
            "found",
        ),
        ("There are 7 stars.", 7, "found"),
        ("7", 7, "found"),
        ("0", 0, "none"),
        ("I cannot tell.", None, "unreadable"),
        ('<points coords="1 1 25', None, "unreadable"),
        ("", None, "unreadable"),
        (NONE_TEXT, 0, "none"),
    ],
)
def test_count(gateway: RunningGateway, text: str, count: int | None, status: str) -> None:
    gateway.engine.script["How many"] = text

    answer = gateway.http.post("/v1/count", json={"image_url": PNG, "object": "stars"}).json()

    assert answer["count"] == count
    assert answer["status"] == status
    assert answer["found"] is (status == "found")
    assert sent_text(gateway) == "How many stars are there in the image? Point to each one."


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (TRACKS, "found"),
        ("No tracks available.", "none"),
        (NONE_TEXT, "none"),
        ("I lost it.", "unreadable"),
        ('<tracks coords="0.0 1 9 9">x</tracks>', "unreadable"),
    ],
)
def test_nothing_there_is_told_from_nothing_readable(
    gateway: RunningGateway, text: str, status: str
) -> None:
    gateway.engine.script["Track"] = text

    answer = gateway.http.post("/v1/track", json={"video_url": MP4, "object": "dogs"}).json()

    assert (answer["status"], answer["found"]) == (status, status == "found")


def test_point_says_when_nothing_is_there(gateway: RunningGateway) -> None:
    gateway.engine.script["Point"] = NONE_TEXT

    answer = gateway.http.post("/v1/point", json={"image_url": PNG, "object": "cats"}).json()

    assert (answer["points"], answer["count"], answer["found"]) == ([], 0, False)


def test_track_follows_each_object(gateway: RunningGateway) -> None:
    gateway.engine.script["Track"] = TRACKS

    answer = gateway.http.post("/v1/track", json={"video_url": MP4, "object": "the dog"}).json()

    assert answer["tracks"] == [
        {
            "id": 1,
            "label": "dog",
            "media_index": 0,
            "points": [
                {"t": 0.0, "frame": 0, "x": 0.1, "y": 0.2, "pixel": {"x": 6.4, "y": 6.4}},
                {"t": 0.5, "frame": 12, "x": 0.15, "y": 0.2, "pixel": {"x": 9.6, "y": 6.4}},
            ],
        },
        {
            "id": 2,
            "label": "dog",
            "media_index": 0,
            "points": [{"t": 0.0, "frame": 0, "x": 0.5, "y": 0.5, "pixel": {"x": 32.0, "y": 16.0}}],
        },
    ]
    assert answer["frames"][-1] == {"index": 49, "time": 2.0}
    assert answer["count"] == 2
    assert sent_text(gateway) == "Track the dog in the video."


def test_caption_and_query(gateway: RunningGateway) -> None:
    gateway.engine.script["Describe"] = " A red circle. "

    caption = gateway.http.post("/v1/caption", json={"image_url": PNG}).json()
    query = gateway.http.post("/v1/query", json={"image_url": PNG, "question": "Where?"}).json()

    assert caption["caption"] == "A red circle."
    assert caption["text"] == " A red circle. "
    assert query["answer"] == gateway.engine.default
    assert query["grounding"]["points"][0]["label"] == "red circle"
    assert sent_text(gateway) == "Where?"


def test_a_cut_answer_says_so(gateway: RunningGateway) -> None:
    gateway.engine.script["Point"] = '<points coords="1 1 250 500 2 300 500 3 350 500">x</points>'

    answer = gateway.http.post(
        "/v1/point", json={"image_url": PNG, "object": "x", "max_tokens": 9}
    ).json()

    assert answer["finish_reason"] == "length"
    assert [p["id"] for p in answer["points"]] == [1]
    assert [w["code"] for w in answer["warnings"]] == ["truncated"]


def test_forms_give_the_same_answers_as_json(gateway: RunningGateway) -> None:
    as_json = gateway.http.post(
        "/v1/point",
        json={"images": [PNG, PNG], "object": "stars", "max_tokens": 50, "temperature": 0.5},
    ).json()
    as_form = gateway.http.post(
        "/v1/point",
        data={"object": "stars", "max_tokens": "50", "temperature": "0.5"},
        files=[("image", ("a.png", picture())), ("image", ("b.png", picture()))],
    ).json()

    del as_json["request_id"], as_form["request_id"]
    assert as_form == as_json
    assert gateway.engine.requests[0] == gateway.engine.requests[1]


def test_a_video_can_be_uploaded(gateway: RunningGateway) -> None:
    gateway.engine.script["Track"] = TRACKS

    answer = gateway.http.post(
        "/v1/track", data={"object": "the dog"}, files={"video": ("a.mp4", video())}
    ).json()

    assert [track["id"] for track in answer["tracks"]] == [1, 2]


def test_a_turned_picture_is_measured_as_it_is_displayed(gateway: RunningGateway) -> None:
    turned = data_url(picture(64, 48, "JPEG", orientation=6), "image/jpeg")

    answer = gateway.http.post("/v1/point", json={"image_url": turned, "object": "x"}).json()

    assert answer["media"] == [{"index": 0, "type": "image", "width": 48, "height": 64}]
    assert answer["points"][0]["pixel"] == {"x": 12.0, "y": 32.0}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(gateway: RunningGateway, kind: str) -> None:
    # The declared type is the caller's guess; the engine is told the true one.
    url = data_url(picture(40, 30, kind), "image/png")

    response = gateway.http.post("/v1/point", json={"image_url": url, "object": "x"})

    assert response.status_code == 200
    sent = gateway.engine.requests[-1]["messages"][0]["content"][0]["image_url"]["url"]
    assert sent.startswith(f"data:image/{kind.lower()};base64,")


def test_answers_are_those_of_the_api_types(gateway: RunningGateway) -> None:
    for verb, model, fields in (
        ("point", api.PointAnswer, {"object": "x"}),
        ("count", api.CountAnswer, {"object": "x"}),
        ("caption", api.CaptionAnswer, {}),
        ("query", api.QueryAnswer, {"question": "x"}),
    ):
        content = gateway.http.post(f"/v1/{verb}", json={"image_url": PNG, **fields}).content
        answer = model.model_validate_json(content)
        assert answer.media[0].width == 64
        assert answer.model_dump_json().encode() == content
