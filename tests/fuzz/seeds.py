"""Small valid inputs that fuzzing begins with."""

from __future__ import annotations

import io
import json

import av
import numpy as np
from PIL import Image

from molmo_core.points import PointGroup, TrackFrame, render_points, render_tracks
from tests.server.media import data_url, picture, video


def answers() -> list[bytes]:
    """Texts as models write them, each behind a byte that chooses how it is read."""
    frames = [TrackFrame(time_s=k / 2, points={1: (0.1, k / 9), 2: (0.5, 0.5)}) for k in range(4)]
    texts = [
        'Counting the <points coords="1 1 250 500">red circle</points> shows a total of 1.',
        '<points coords="1 1 250 500 2 300 400;2 1 0 1000" alt="x &amp; y">a</points>',
        '<point x="10.5" y="20" alt="a">a</point><points x1="1" y1="2" x2="3" y2="4">b</points>',
        "There are none.",
        "no tracks available",
        render_tracks(frames, "ball"),
        render_points([PointGroup(points=[(0.25, 0.5), (0.1, 0.2)])], "star"),
        '<tracks coords="0.0 1 100 100;0.5 1 110 100 2 5 5">a</tracks> <points coords="',
    ]
    return [bytes([how]) + text.encode() for how, text in enumerate(texts)]


def pictures() -> list[bytes]:
    small = [picture(8, 6, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    turned = [picture(6, 4, "JPEG", orientation=6), picture(6, 4, "PNG", orientation=8)]
    return [*small, *turned, _moving("GIF"), _moving("PNG"), _moving("WEBP"), _palette()]


def videos() -> list[bytes]:
    return [
        video(n_frames=3),
        _video("matroska", "libx264"),
        _video("webm", "libvpx"),
        _video("webm", "libvpx-vp9"),
        _video("mov", "libx264"),
    ]


def data_urls() -> list[bytes]:
    urls = [data_url(picture(4, 3, kind), f"image/{kind.lower()}") for kind in ("PNG", "JPEG")]
    others = ["data:image/png;base64,", "media://media-" + "0" * 32, "https://a.example/x.png"]
    return [url.encode() for url in (*urls, *others, "data:;charset=x;base64,QQ==")]


def manifests() -> list[bytes]:
    manifest = {
        "id": "a-0123456789ab",
        "name": "a",
        "source": "run",
        "step": 1,
        "code_version": "0",
        "created": 0.0,
        "bidirectional": "all",
        "files": [{"name": "config.json", "n_bytes": 2, "sha256": "0" * 64}],
        "probes": [{"question": "Hi", "answer_ids": [7], "logprobs": [-1.0]}],
    }
    return [json.dumps(manifest).encode()]


def headers() -> list[bytes]:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {}}'
    return [len(header).to_bytes(8, "little") + header + bytes(4)]


def chats() -> list[bytes]:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "text", "text": "Point to it", "style": "pointing"},
    ]
    bodies = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": parts}], "n": 2, "stop": ["a"], "seed": 1},
        {
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho", "tool_calls": []},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "max_completion_tokens": 5,
        },
    ]
    return [json.dumps(body).encode() for body in bodies]


def batches() -> list[bytes]:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    lines = [
        {"custom_id": f"{k}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for k in range(3)
    ]
    whole = b"\n".join(json.dumps(line).encode() for line in lines)
    return [whole, b"\xef\xbb\xbf" + whole + b"\r\n\n", whole[:-9], b"[]\n{}\n"]


def forms() -> list[bytes]:
    """Behind a byte that chooses the cuts."""
    field = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    named = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    file = named + b"Content-Type: application/json\r\n\r\n{}\n\r\n-\r\n--\r\n"
    return [
        b"\x07" + field + file + b"--b--\r\n",
        b"\x00" + file + field + b"--b--",
        b"\x30" + named,
    ]


def _moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (5, 4), (k, 0, 0)) for k in (0, 90, 180)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=10)
    return buffer.getvalue()


def _palette() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (5, 4)).save(buffer, "PNG", transparency=0)
    return buffer.getvalue()


def _video(container: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for k in range(3):
            pixels = np.full((32, 32, 3), 40 * k, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()
