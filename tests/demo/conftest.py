"""The demo page as people run it, in front of a real gateway with a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from molmo_client import Client
from molmo_demo.app import build_app, launch_options
from tests.demo.browsing import running_browser
from tests.support.gateway import RunningGateway


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_url(
    shared_gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as environment, Client(shared_gateway.url) as client:
        environment.setenv("GRADIO_TEMP_DIR", str(folder))
        # Gradio's statistics of its queue make pandas warn, and warnings are errors here.
        environment.setenv("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
        app = build_app(client, folder=folder)
        options = launch_options(host="127.0.0.1", port=None)
        _, url, _ = app.launch(**options, prevent_thread_lock=True)
        try:
            yield url
        finally:
            app.close()
