"""The grammar that a verb's answer is decoded under, and engines that do not know any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from molmo_core.points.grammar import points_grammar, tracks_grammar
from molmo_server.engine_pool import EngineAddress, EnginePool, RemoteEngine
from molmo_server.engine_pool.fake import FakeEngine
from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, picture, video
from tests.server.several import fake_at_port
from tests.support.gateway import FAST, RunningGateway, running_gateway, serve_in_thread, until

PNG, MP4 = data_url(picture()), data_url(video(), "video/mp4")
TRACKS = '<tracks coords="0.0 1 100 200 2 500 500;0.5 1 150 200">dog</tracks>'


def grammar_sent(gateway: RunningGateway, path: str, **body: object) -> str | None:
    """What the engine was told to decode under."""
    assert gateway.http.post(path, json={"object": "stars", **body}).status_code == 200
    grammar: str | None = gateway.engine.requests[-1].get("structured_outputs", {}).get("grammar")
    return grammar


def test_an_answer_is_decoded_under_its_verbs_grammar(gateway: RunningGateway) -> None:
    point = grammar_sent(gateway, "/v1/point", images=[PNG, PNG], max_tokens=99)
    assert point == points_grammar(n_media=2, max_points=32)
    count = grammar_sent(gateway, "/v1/count", images=[PNG], constrained=True, max_tokens=999)
    assert count == points_grammar(n_media=1, max_points=64, is_counted=True)
    gateway.engine.script["stars"] = TRACKS
    track = grammar_sent(gateway, "/v1/track", video_url=MP4)
    frames = gateway.http.post("/v1/track", json={"object": "x", "video_url": MP4}).json()["frames"]
    assert track == tracks_grammar([frame["time"] for frame in frames])


def test_unless_the_request_or_the_server_says_otherwise(
    gateway: RunningGateway, folder: Path, tmp_path: Path
) -> None:
    assert grammar_sent(gateway, "/v1/point", images=[PNG], constrained=False) is None
    with running_gateway(folder, tmp_path, constrains_verbs=False) as free:
        assert grammar_sent(free, "/v1/point", images=[PNG]) is None
        assert grammar_sent(free, "/v1/point", images=[PNG], constrained=True) is not None


def test_so_many_points_fit_into_the_grammar(gateway: RunningGateway) -> None:
    few = grammar_sent(gateway, "/v1/point", images=[PNG], max_points=3)
    assert few == points_grammar(max_points=3)
    no_more_than_fit = grammar_sent(gateway, "/v1/count", images=[PNG], max_points=999)
    assert no_more_than_fit == points_grammar(max_points=128, is_counted=True)
    gateway.engine.script["stars"] = TRACKS
    two = grammar_sent(gateway, "/v1/track", video_url=MP4, max_points=2)
    assert two == tracks_grammar([0, 0.5, 1, 1.5, 2], max_objects=2)
    many = grammar_sent(gateway, "/v1/track", video_url=MP4, max_points=999)
    assert many == tracks_grammar([0, 0.5, 1, 1.5, 2])


def test_only_answers_that_point_have_a_grammar(gateway: RunningGateway) -> None:
    response = gateway.http.post("/v1/caption", json={"images": [PNG], "constrained": True})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unknown_parameter"
    gateway.http.post("/v1/caption", json={"images": [PNG]})
    assert "structured_outputs" not in gateway.engine.requests[-1]


def test_an_engine_that_refuses_grammars_is_asked_without(gateway: RunningGateway) -> None:
    asked: dict[str, Any] = {"image_url": PNG, "object": "x [no grammars]"}

    answer = gateway.http.post("/v1/point", json=asked)

    assert answer.json()["count"] == 1
    sent = ["structured_outputs" in body for body in gateway.engine.requests]
    assert sent == [True, False]
    # Whoever asks for one is told that there is none.
    refused = gateway.http.post("/v1/point", json={**asked, "constrained": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")


def test_of_an_engine_of_others_that_is_remembered(folder: Path) -> None:
    engine = FakeEngine()
    settings = MolmoSettings(checkpoint=folder, drain_s=0.5)

    def engines(url: str) -> EnginePool:
        return EnginePool([RemoteEngine(name="other", address=EngineAddress(url=url), timing=FAST)])

    with (
        fake_at_port(engine) as at,
        serve_in_thread(settings, lambda: engines(at)) as url,
        httpx2.Client(base_url=url, timeout=60) as http,
    ):
        until(lambda: http.get("/ready").status_code == 200)
        for what in ("x [no grammars]", "y", "z"):
            asked = {"image_url": PNG, "object": what}
            assert http.post("/v1/point", json=asked).status_code == 200
        sent = ["structured_outputs" in body for body in engine.requests]
        assert sent == [True, False, False, False]
        http.post("/v1/point", json={**asked, "constrained": True})
        assert "structured_outputs" in engine.requests[-1]


def test_another_refusal_stays_one(gateway: RunningGateway) -> None:
    refused = gateway.http.post("/v1/point", json={"image_url": PNG, "object": "x [400]"})

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")
    assert len(gateway.engine.requests) == 2
    assert grammar_sent(gateway, "/v1/point", images=[PNG]) is not None
