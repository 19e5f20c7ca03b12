"""`molmo demo`: a page to upload pictures or a video, ask, and see where the answer points.

The page talks to a gateway through `molmo_client` and to nothing else: no telemetry, no shared
link, no fonts from elsewhere, no interface for programs (they ask the gateway). Gradio answers
every visitor on a thread; all threads share one client. Knows: the layout. Does not know: how
questions are asked (`answers`), models. Source: this project's own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from cyclopts import Parameter
from PIL import Image

from molmo_client import Client, terminal
from molmo_core.errors import MolmoError
from molmo_demo.answers import (
    IMAGE_VERBS,
    MAX_IMAGES,
    VIDEO_VERBS,
    ask_images,
    ask_video,
    describe_server,
)

TITLE = "Molmo: point, count, track"
_MAX_UPLOAD = "64mb"
_N_AT_ONCE = 4
_KEPT_S = 3600  # uploads and drawings of a session, then they are deleted
_FONT = ("system-ui", "sans-serif")  # the default theme would fetch its fonts
_THEME = gr.themes.Default(font=_FONT, font_mono=("ui-monospace", "monospace"))
_QUESTION_HINT = "point, count, track: what to look for; ask: a question; caption: leave empty"


class PortTaken(MolmoError):
    """Another program listens where the page was to be."""


def build_app(client: Client, *, folder: Path) -> gr.Blocks:
    """The page, asking through `client`; drawn videos go to `folder`.

    Start it with `launch_options`.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S)) as app:
        gr.Markdown(f"# {TITLE}")
        server = gr.Textbox(label="Server", interactive=False, max_lines=1, elem_id="server")
        with gr.Tab("Pictures"):
            _image_tab(client)
        with gr.Tab("Video"):
            _video_tab(client, folder)
        app.load(lambda: describe_server(client), outputs=server, api_visibility="private")
    return app


def launch_options(*, host: str, port: int | None) -> dict[str, Any]:
    """Keyword arguments for the page's `launch`."""
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "mcp_server": False,
        "run_history": False,
        "show_error": True,
        "quiet": True,
        "max_file_size": _MAX_UPLOAD,
        "footer_links": [],
        "theme": _THEME,
    }


def demo_command(
    *,
    server: Annotated[str | None, Parameter(help="Address; else MOLMO_SERVER")] = None,
    host: Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on")] = 7860,
) -> None:
    """Open the demo page, which asks the server."""
    _check_port(host, port)
    with Client(server) as client, tempfile.TemporaryDirectory(prefix="molmo-demo-") as private:
        os.environ["GRADIO_TEMP_DIR"] = private  # uploads too, and they go when the page goes
        app = build_app(client, folder=Path(private))
        options = launch_options(host=host, port=port)
        _, address, _ = app.launch(**options, prevent_thread_lock=True)
        terminal.say(f"The demo is at {address} and asks {client.connection.url}; Ctrl-C ends it.")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        app.block_thread()


def _check_port(host: str, port: int) -> None:
    """Told at once, and in our words: Gradio would build the page first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as failure:
        raise PortTaken(
            f"cannot listen on port {port} of {host} ({failure}); end the program that does, "
            "or choose another with --port"
        ) from failure


def _image_tab(client: Client) -> None:
    with gr.Row():
        with gr.Column():
            pictures = gr.Gallery(
                label=f"1 to {MAX_IMAGES} pictures",
                file_types=["image"],
                type="filepath",
                sources=["upload", "clipboard"],
                object_fit="contain",
                elem_id="image-input",
            )
            verb, text, button = _question(IMAGE_VERBS, "image")
        with gr.Column():
            words = _words("image")
            drawn = gr.Gallery(
                label="Where it points",
                format="png",
                interactive=False,
                preview=True,
                object_fit="contain",
                elem_id="image-output",
            )
            raw = _raw("image")

    def answer(
        chosen: list[tuple[str, str | None]] | None, verb: str, text: str
    ) -> tuple[str, list[Image.Image], dict[str, Any] | None]:
        paths = [path for path, _ in chosen or ()]
        outcome = ask_images(client, paths, verb, text)
        return outcome.text, outcome.pictures, outcome.json

    _on_ask(button, text, answer, [pictures, verb, text], [words, drawn, raw])
    with as_file(files("molmo_client") / "examples" / "shapes.png") as example:
        gr.Examples(
            [
                [[str(example)], "point", "the red circle"],
                [[str(example)], "count", "blue stars"],
                [[str(example)], "caption", ""],
            ],
            inputs=[pictures, verb, text],
            api_visibility="private",
        )


def _video_tab(client: Client, folder: Path) -> None:
    with gr.Row():
        with gr.Column():
            video = gr.Video(label="Video", sources=["upload"], height=320, elem_id="video-input")
            verb, text, button = _question(VIDEO_VERBS, "video")
        with gr.Column():
            words = _words("video")
            drawn = gr.Video(label="Where it points", interactive=False, elem_id="video-output")
            raw = _raw("video")

    def answer(
        path: str | None, verb: str, text: str
    ) -> tuple[str, str | None, dict[str, Any] | None]:
        outcome = ask_video(client, path, verb, text, folder=folder)
        return outcome.text, outcome.video, outcome.json

    _on_ask(button, text, answer, [video, verb, text], [words, drawn, raw])


def _question(verbs: tuple[str, ...], name: str) -> tuple[gr.Dropdown, gr.Textbox, gr.Button]:
    verb = gr.Dropdown(list(verbs), value=verbs[0], label="What to do", elem_id=f"{name}-verb")
    text = gr.Textbox(
        label="Object or question",
        placeholder="the red circle",
        info=_QUESTION_HINT,
        max_lines=4,
        elem_id=f"{name}-text",
    )
    return verb, text, gr.Button("Ask", variant="primary", elem_id=f"{name}-ask")


def _words(name: str) -> gr.Textbox:
    """A text box shows a model's text as it is; nothing in it is rendered."""
    return gr.Textbox(label="Answer", interactive=False, lines=3, elem_id=f"{name}-answer")


def _raw(name: str) -> gr.JSON:
    with gr.Accordion("JSON", open=False):
        return gr.JSON(label="JSON", elem_id=f"{name}-json")


def _on_ask(
    button: gr.Button, text: gr.Textbox, answer: Any, inputs: list[Any], outputs: list[Any]
) -> None:
    for trigger in (button.click, text.submit):
        trigger(answer, inputs, outputs, concurrency_limit=_N_AT_ONCE, api_visibility="private")
