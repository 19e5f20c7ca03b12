"""One question of the page: words, drawings and JSON, or words on what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from molmo_client import Client
from molmo_client.draw import PALETTE
from molmo_demo.answers import ask_images, ask_video, describe_server
from tests.server import media
from tests.support.gateway import RunningGateway


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Client]:
    with Client(gateway.url) as client:
        yield client


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    for path in paths:
        Image.new("RGB", (200, 100), "white").save(path)
    return [str(path) for path in paths]


def test_every_picture_comes_back_with_its_own_points(
    client: Client, gateway: RunningGateway, pictures: list[str]
) -> None:
    text = '<points coords="1 1 250 500;2 2 750 500 3 500 200">dots</points>'
    gateway.engine.script["dots"] = text
    outcome = ask_images(client, pictures[:2], "point", "dots")
    first, second = (np.asarray(picture) for picture in outcome.pictures)
    dot = list(PALETTE[0])
    assert first[50, 50].tolist() == dot
    assert first[50, 150].tolist() == [255, 255, 255]
    assert second[50, 150].tolist() == dot
    assert second[20, 100].tolist() == dot
    assert outcome.json is not None
    assert [point["media_index"] for point in outcome.json["points"]] == [0, 1, 1]
    assert outcome.text.startswith("3 found")


@pytest.mark.parametrize("n", [0, 5])
def test_number_of_pictures_is_checked_first(
    client: Client, gateway: RunningGateway, pictures: list[str], n: int
) -> None:
    outcome = ask_images(client, pictures[:n], "point", "dots")
    assert f"there are {n}" in outcome.text
    assert gateway.engine.requests == []


@pytest.mark.parametrize("verb", ["caption", "ask"])
def test_answers_without_points_show_the_picture(
    client: Client, gateway: RunningGateway, pictures: list[str], verb: str
) -> None:
    gateway.engine.script[""] = "A white sheet."
    outcome = ask_images(client, pictures[:1], verb, "What is it?")
    assert outcome.text == "A white sheet."
    assert (np.asarray(outcome.pictures[0]) == 255).all()


def test_an_error_is_told_beside_the_picture(client: Client, pictures: list[str]) -> None:
    outcome = ask_images(client, pictures[:1], "point", "<im_end>")
    assert outcome.text.startswith("Error: got the model's own control token")
    assert len(outcome.pictures) == 1
    assert outcome.json is None


def test_no_picture_at_all(client: Client, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    outcome = ask_images(client, [str(tmp_path / "note.png")], "point", "dots")
    assert "is no picture or video" in outcome.text
    assert outcome.pictures == []


def test_points_of_a_video_are_drawn_into_it(
    client: Client, gateway: RunningGateway, tmp_path: Path
) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(media.video(n_frames=50))
    gateway.engine.script["ball"] = '<points coords="0.0 1 500 500">ball</points>'
    outcome = ask_video(client, str(source), "point", "ball", folder=tmp_path)
    assert outcome.video is not None
    with av.open(outcome.video) as drawn:
        frames = [frame.to_ndarray(format="rgb24") for frame in drawn.decode(video=0)]
    assert len(frames) == 50
    assert np.abs(frames[0][16, 32].astype(int) - PALETTE[0]).max() < 60
    assert np.abs(frames[-1][16, 32].astype(int) - PALETTE[0]).max() > 60


def test_a_video_without_places_is_not_drawn(
    client: Client, gateway: RunningGateway, tmp_path: Path
) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(media.video(n_frames=50))
    gateway.engine.script["ball"] = "There are none."
    outcome = ask_video(client, str(source), "track", "ball", folder=tmp_path)
    assert (outcome.text, outcome.video) == ("There are none.", None)
    assert ask_video(client, None, "track", "ball", folder=tmp_path).text.startswith("Upload")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(source.read_bytes()[:200])
    outcome = ask_video(client, str(broken), "track", "ball", folder=tmp_path)
    assert outcome.text.startswith("Error: ")


def test_who_answers(client: Client, gateway: RunningGateway) -> None:
    assert describe_server(client) == f"{gateway.url}: {client.models().data[0].checkpoint}"
    with Client("http://127.0.0.1:9") as nobody:
        assert "molmo serve" in describe_server(nobody)
