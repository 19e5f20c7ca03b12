"""What is fuzzed. A target raises only when something is not as it should be: any error that is
not one of the project's own, a result that depends on how it was cut, work beyond measure.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from molmo_core.checkpoints.manifest import MANIFEST, check_files, read_manifest
from molmo_core.checkpoints.safetensors_header import read_header
from molmo_core.errors import CheckpointError, InvalidMedia, MolmoError
from molmo_core.points import Grounding, GroundingParser, parse_grounding
from molmo_server.batches.lines import Reading
from molmo_server.batches.upload import Upload, receive_file
from molmo_server.errors import parse_json
from molmo_server.media.gate import MediaGate
from molmo_server.media.look import measure_image
from molmo_server.media.probe import VideoLimits, container_type, look_at
from molmo_server.openai_api.chat_request import ChatRequest
from molmo_server.prompt import check_turns
from molmo_server.settings import MolmoSettings
from tests.fuzz import seeds

_SETTINGS = MolmoSettings(max_image_pixels=1_000_000, max_image_bytes=100_000)
_LIMITS = VideoLimits(max_duration_s=600, max_side_px=512, max_frames=1000)
_PATIENCE_S, _PATIENCE_PER_CHAR_S = 0.5, 2e-4
"""Of processor time: ten times what the longest texts take on a slow machine."""


@dataclass(frozen=True, kw_only=True)
class Target:
    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def check_points(data: bytes) -> None:
    """The first byte chooses media and cuts; the rest is the answer."""
    how, text = (data[:1] or b"\0")[0], data[1:].decode(errors="replace")
    media: Literal["image", "video"] = "video" if how & 1 else "image"
    options = {"media": media, "n_media": 1 if how & 1 else how >> 1 & 3, "legacy": bool(how & 8)}
    began = time.process_time()
    whole = parse_grounding(text, **options)
    assert _in_pieces(text, 1 + (how >> 4), options) == whole, "cuts change the result"
    took_s = time.process_time() - began
    assert took_s < _PATIENCE_S + _PATIENCE_PER_CHAR_S * len(text), f"{took_s} s"
    for point in whole.points:
        assert 0 <= point.x <= 1, point
        assert 0 <= point.y <= 1, point


def _in_pieces(text: str, n_chars: int, options: dict[str, object]) -> Grounding:
    parser = GroundingParser(**options)
    for start in range(0, len(text), n_chars):
        parser.feed(text[start : start + n_chars])
    return parser.close()


def check_picture(data: bytes) -> None:
    with suppress(InvalidMedia):
        (height, width), mime = measure_image(data, "it", _SETTINGS)
        assert 1 <= height * width <= _SETTINGS.max_image_pixels
        assert mime.startswith("image/")


def check_video(data: bytes) -> None:
    if container_type(data) is None:
        return  # never reaches a demuxer
    with suppress(InvalidMedia):
        fields = look_at(data, _LIMITS)
        assert 1 <= max(fields["width_px"], fields["height_px"]) <= _LIMITS.max_side_px
        assert 0 <= fields["duration_s"] <= _LIMITS.max_duration_s
        times = fields["frame_times_s"]
        assert list(times) == sorted(times)
        assert len(times) >= 1


@cache
def _gate() -> tuple[asyncio.AbstractEventLoop, MediaGate]:
    return asyncio.new_event_loop(), MediaGate(_SETTINGS)


def check_data_url(data: bytes) -> None:
    loop, gate = _gate()
    with suppress(MolmoError):
        checked = loop.run_until_complete(gate.check([data.decode(errors="replace")], []))
        (image,) = checked.images
        assert image.file.data_url().startswith("data:image/"), image.file.mime


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="molmo-fuzz-"))


def check_manifest(data: bytes) -> None:
    folder = _scratch()
    (folder / MANIFEST).write_bytes(data)
    (folder / "config.json").write_bytes(b"{}")
    with suppress(CheckpointError):
        check_files(folder, read_manifest(folder))


def check_header(data: bytes) -> None:
    path = _scratch() / "model.safetensors"
    path.write_bytes(data)
    with suppress(OSError, ValueError):
        read_header(path)


def check_chat(data: bytes) -> None:
    with suppress(MolmoError):
        request = parse_json(data, ChatRequest)
        request.media_urls(), request.engine_options(max_schema_bytes=10_000)
        check_turns(request.turns(), system=request.system())


def check_batch(data: bytes) -> None:
    path = _scratch() / "batch.jsonl"
    path.write_bytes(data)
    reading = Reading(endpoint="/v1/chat/completions", max_line_bytes=2000, max_lines=50)
    n_lines, errors = reading.check(path)
    if not errors:
        lines = list(reading.lines(path))
        assert len(lines) == n_lines >= 1
        assert len({line.custom_id for line in lines}) == n_lines


def check_form(data: bytes) -> None:
    """The first byte chooses the cuts; in text before the first boundary the library sees them."""
    how, form = (data[:1] or b"\0")[0], data[1:]
    cut, whole = _received(form, 1 + how), _received(form, len(form) + 1)
    if cut is not None and whole is not None:
        assert cut == whole, "cuts change the result"


def _received(form: bytes, n_bytes: int) -> tuple[Upload, bytes] | None:
    """(what was sent beside the file, the file); None when it is refused."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(form), n_bytes):
            yield form[start : start + n_bytes]

    part = io.BytesIO()
    kind = "multipart/form-data; boundary=b"
    loop, _ = _gate()
    try:
        upload = loop.run_until_complete(receive_file(pieces(), kind, part, max_bytes=1000))
    except MolmoError:
        return None
    return upload, part.getvalue()


TARGETS = {
    "points": Target(check=check_points, seeds=seeds.answers),
    "picture": Target(check=check_picture, seeds=seeds.pictures),
    "video": Target(check=check_video, seeds=seeds.videos),
    "data_url": Target(check=check_data_url, seeds=seeds.data_urls),
    "manifest": Target(check=check_manifest, seeds=seeds.manifests),
    "header": Target(check=check_header, seeds=seeds.headers),
    "batch": Target(check=check_batch, seeds=seeds.batches),
    "form": Target(check=check_form, seeds=seeds.forms),
    "chat": Target(check=check_chat, seeds=seeds.chats),
}
