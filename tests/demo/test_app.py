"""The page in a real browser: upload, ask, and the dots are where the objects are."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path

import av
import httpx2
import numpy as np
from playwright.sync_api import Browser

from molmo_client.draw import PALETTE, Style, open_image
from molmo_core.clips import draw_frame, sample_clip, write_clip
from molmo_core.scenes import parse_query
from molmo_core.videos import sample_times
from molmo_server.checkpoints.folder import read_checkpoint
from tests.client.example_scene import EXAMPLE_SCENE
from tests.demo.browsing import ask, drawn_picture, drawn_video, opened, upload
from tests.evals.oracle import points_text, tracks_text
from tests.support.gateway import RunningGateway

EXAMPLE = Path(str(files("molmo_client") / "examples" / "shapes.png"))
SIZE_PX = (EXAMPLE_SCENE.width_px, EXAMPLE_SCENE.height_px)


def dot_centre(pixels: np.ndarray, x_px: float, y_px: float, radius_px: int) -> np.ndarray | None:
    """(x, y) of the middle of what has the first dot's colour within `radius_px` of a place."""
    ys, xs = np.nonzero((np.abs(pixels.astype(int) - PALETTE[0]) < 40).all(axis=2))
    near = np.hypot(xs + 0.5 - x_px, ys + 0.5 - y_px) <= radius_px
    return np.array([xs[near].mean() + 0.5, ys[near].mean() + 0.5]) if near.any() else None


def test_points_are_where_the_objects_are(
    browser: Browser, page_url: str, gateway: RunningGateway
) -> None:
    query = parse_query("blue stars")
    gateway.engine.script["blue stars"] = points_text([EXAMPLE_SCENE], query)
    with opened(browser, page_url) as page:
        upload(page, "image", EXAMPLE)
        words = ask(page, "image", "point", "blue stars")
        pixels = np.asarray(drawn_picture(page))
    assert words.startswith("2 found")
    reach_px = Style.for_size(*SIZE_PX).dot_radius_px
    for item in EXAMPLE_SCENE.objects:
        centre = dot_centre(pixels, item.x_px, item.y_px, reach_px)
        if query.matches(item):
            assert centre is not None
            assert np.hypot(*(centre - (item.x_px, item.y_px))) < 1.5
        else:
            assert centre is None
    assert pixels.shape[1] == SIZE_PX[0]
    assert pixels.shape[0] > SIZE_PX[1]  # the legend


def test_count_of_another_kind_after_the_first_answer(
    browser: Browser, page_url: str, gateway: RunningGateway
) -> None:
    gateway.engine.script["purple"] = "There are none."
    gateway.engine.script["green"] = points_text(
        [EXAMPLE_SCENE], parse_query("green squares"), mode="point_count"
    )
    with opened(browser, page_url) as page:
        upload(page, "image", EXAMPLE)
        assert ask(page, "image", "count", "green squares") == "1"
        assert ask(page, "image", "count", "purple stars") == "0"
        pixels = np.asarray(drawn_picture(page))
    assert (pixels == np.asarray(open_image(EXAMPLE))).all()


def test_tracks_are_drawn_in_the_video(
    browser: Browser, page_url: str, gateway: RunningGateway, folder: Path, tmp_path: Path
) -> None:
    clip = sample_clip(
        np.random.default_rng(7), n_objects=1, min_side_px=160, max_side_px=240, max_duration_s=2
    )
    item = clip.objects[0]
    query = parse_query(f"the {item.colour} {item.shape}")
    geometry = read_checkpoint(folder).video
    times_s = sample_times(clip.duration_s, geometry, source_fps=clip.fps)
    gateway.engine.script[query.label] = tracks_text(clip, query, times_s)
    write_clip(clip, tmp_path / "clip.mp4")
    with opened(browser, page_url) as page:
        page.click("role=tab[name=Video]")
        upload(page, "video", tmp_path / "clip.mp4")
        words = ask(page, "video", "track", query.label)
        content = drawn_video(page)
    assert words.startswith("1 found")
    with av.open(io.BytesIO(content)) as drawn:
        frames = [frame.to_ndarray(format="rgb24") for frame in drawn.decode(video=0)]
    assert len(frames) == clip.n_frames
    reach_px = Style.for_size(clip.width_px, clip.height_px).dot_radius_px
    for time_s in times_s[:-1]:
        index = int(time_s * clip.fps + 1e-6)
        place = clip.positions(time_s)[0]
        assert dot_centre(draw_frame(clip, time_s), *place, reach_px) is None
        centre = dot_centre(frames[index], *place, 2 * reach_px)
        assert centre is not None
        assert np.hypot(*(centre - place)) < 4


def test_an_example_can_be_asked(browser: Browser, page_url: str, gateway: RunningGateway) -> None:
    gateway.engine.script["the red circle"] = points_text(
        [EXAMPLE_SCENE], parse_query("the red circle")
    )
    with opened(browser, page_url) as page:
        page.click("tr:has-text('the red circle')")
        page.wait_for_selector("#image-input img")
        page.click("#image-ask")
        page.wait_for_selector("#image-output img")
        pixels = np.asarray(drawn_picture(page))
    circle = EXAMPLE_SCENE.objects[0]
    centre = dot_centre(pixels, circle.x_px, circle.y_px, Style.for_size(*SIZE_PX).dot_radius_px)
    assert centre is not None


def test_what_the_model_writes_is_never_rendered(
    browser: Browser, page_url: str, gateway: RunningGateway
) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"> **bold** ${document.title}"
    gateway.engine.script["anything"] = f'<points coords="1 1 500 500">{hostile}</points>'
    with opened(browser, page_url) as page:
        title = page.title()
        upload(page, "image", EXAMPLE)
        words = ask(page, "image", "ask", "anything")
        page.click("button:has-text('JSON')")
        page.wait_for_selector("#image-json :text('grounding')")
        assert hostile in words
        assert page.query_selector("img[src=x]") is None
        assert page.title() == title


def test_a_refusal_and_a_missing_picture_are_told(
    browser: Browser, page_url: str, gateway: RunningGateway
) -> None:
    with opened(browser, page_url) as page:
        assert ask(page, "image", "point", "stars").startswith("Upload 1 to 4 pictures first")
        upload(page, "image", EXAMPLE)
        assert "control token '<im_end>'" in ask(page, "image", "point", "<im_end>")
    assert gateway.engine.requests == []


def test_the_page_talks_to_its_own_server_only(browser: Browser, page_url: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_url)
    page.wait_for_selector("#image-ask")
    page.close()
    foreign = [url for url in asked if not url.startswith((page_url, "data:", "blob:"))]
    assert asked
    assert foreign == []


def test_no_interface_for_programs(page_url: str) -> None:
    described = httpx2.get(f"{page_url}gradio_api/info").json()
    assert described["named_endpoints"] == {}
    assert described["unnamed_endpoints"] == {}
