"""The picture of the demo page in the documentation, made against a running server.

    molmo serve &
    python -m tests.demo.screenshot docs/demo.png

asks for the blue stars on the bundled picture and checks that they were found before it saves.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from molmo_client import Client
from molmo_demo.app import build_app, launch_options
from tests.demo.browsing import ask, opened, running_browser, upload

EXAMPLE = Path(str(files("molmo_client") / "examples" / "shapes.png"))
STILL = "document.getAnimations().every(one => one.playState !== 'running')"
app = App(name="screenshot", help=__doc__)


@app.default
def take(
    out: Path,
    /,
    *,
    server: Annotated[str | None, Parameter(help="Address; else MOLMO_SERVER")] = None,
    text: Annotated[str, Parameter(help="What to point to")] = "blue stars",
) -> int:
    """Write the screenshot to OUT; 1 when the page shows no point."""
    with tempfile.TemporaryDirectory() as private, Client(server) as client:
        os.environ["GRADIO_TEMP_DIR"] = private
        demo = build_app(client, folder=Path(private))
        options = launch_options(host="127.0.0.1", port=None)
        _, url, _ = demo.launch(**options, prevent_thread_lock=True)
        try:
            with running_browser() as browser, opened(browser, url) as page:
                upload(page, "image", EXAMPLE)
                words = ask(page, "image", "point", text)
                page.wait_for_selector("#image-output img")
                page.wait_for_load_state("networkidle")
                page.wait_for_function(STILL)
                out.parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=out)
        finally:
            demo.close()
    sys.stdout.write(f"{words}\n{out}\n")
    return 0 if " found" in words else 1


if __name__ == "__main__":
    sys.exit(app())
