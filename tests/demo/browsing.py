"""The demo page in Debian's Chromium: opening it, asking, reading what it drew.

Knows: the page's element ids. Does not know: who answers.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ANSWER_TIMEOUT_MS = 120_000
_SIZE_PX = {"width": 1280, "height": 1150}


@contextmanager
def running_browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "install Debian's chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, headless=True, args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """The page, ready to be used."""
    page = browser.new_page(viewport=_SIZE_PX)
    page.set_default_timeout(ANSWER_TIMEOUT_MS)
    page.goto(url)
    page.wait_for_selector("#image-ask")
    try:
        yield page
    finally:
        page.close()


def upload(page: Page, tab: str, file: Path) -> None:
    """`tab` is `image` or `video`; returns when the page shows the file."""
    page.set_input_files(f"#{tab}-input input[type=file]", file)
    page.wait_for_selector(f"#{tab}-input {'img' if tab == 'image' else 'video'}")


def ask(page: Page, tab: str, verb: str, text: str) -> str:
    """Ask and wait; returns the answer in words."""
    before = answer_in_words(page, tab)
    if page.input_value(f"#{tab}-verb input") != verb:
        page.click(f"#{tab}-verb input")
        page.click(f"#{tab}-verb [role=option]:text-is('{verb}')")
    page.fill(f"#{tab}-text textarea", text)
    page.click(f"#{tab}-ask")
    page.wait_for_function(
        "([id, before]) => document.querySelector(id).value !== before",
        arg=[f"#{tab}-answer textarea", before],
    )
    return answer_in_words(page, tab)


def answer_in_words(page: Page, tab: str) -> str:
    return page.input_value(f"#{tab}-answer textarea")


def drawn_picture(page: Page) -> Image.Image:
    """The file behind the picture that the page shows, at its full size."""
    source = page.get_attribute("#image-output img", "src")
    assert source is not None
    response = page.request.get(source)
    assert response.ok, response.status
    return Image.open(io.BytesIO(response.body())).convert("RGB")


def drawn_video(page: Page) -> bytes:
    page.wait_for_selector("#video-output video[src]")
    source = page.get_attribute("#video-output video", "src")
    assert source is not None
    response = page.request.get(source)
    assert response.ok, response.status
    return response.body()
