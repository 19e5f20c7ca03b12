"""Media are measured as they are displayed, and looked at under limits."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoGeometry
from molmo_server.media import look
from molmo_server.media.gate import MediaGate
from molmo_server.media.look import Looks, measure_image, probe_in_child
from molmo_server.settings import MolmoSettings
from tests.server.media import data_url, picture, video

SETTINGS = MolmoSettings()


def turned(data: bytes) -> bytes:
    """The same mp4 with a matrix that turns it by a quarter, as telephones write it."""
    # In the track header behind version, flags, times, ids and the like.
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    return data[:start] + matrix + data[start + len(matrix) :]


async def test_a_video_is_measured() -> None:
    info = await probe_in_child(video(n_frames=10, rate=25), SETTINGS)

    assert (info.width_px, info.height_px, info.n_frames) == (64, 32, 10)
    assert info.duration_s == pytest.approx(0.4)
    assert info.frame_times_s[3] == pytest.approx(0.12)


async def test_a_turned_video_is_measured_as_it_is_displayed() -> None:
    info = await probe_in_child(turned(video()), SETTINGS)

    assert (info.width_px, info.height_px) == (32, 64)


@pytest.mark.parametrize(
    "limits", [{"probe_memory_bytes": 64 * 1024 * 1024}, {"probe_timeout_s": 0.01}]
)
async def test_a_video_that_costs_too_much_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidMedia, match=r"too much time or memory|more memory than"):
        await probe_in_child(video(), MolmoSettings(**limits))


async def test_frames_too_large_for_the_limits() -> None:
    with pytest.raises(InvalidMedia, match="is 64x32 pixels, allowed are 48 a side"):
        await probe_in_child(video(), MolmoSettings(max_video_side_px=48))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_measured_as_they_are_displayed(orientation: int) -> None:
    data = picture(64, 48, "JPEG", orientation=orientation)

    size_hw, mime = measure_image(data, "image 1", SETTINGS)

    assert size_hw == ((64, 48) if orientation >= 5 else (48, 64))
    assert mime == "image/jpeg"


async def test_large_pictures_are_looked_at_apart_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, cut = picture(64, 48, "JPEG", orientation=6), picture(200, 200)[:-40_000]
    here, apart = Looks(SETTINGS, lambda: None), Looks(SETTINGS, lambda: None)
    expected = await here.look(good, "image 2", "image")
    with pytest.raises(InvalidMedia) as refused:
        await here.look(cut, "image 2", "image")

    monkeypatch.setattr(look, "_APART_FROM_PX", 0)

    assert await apart.look(good, "image 2", "image") == expected
    assert (expected.size_hw, expected.mime) == ((64, 48), "image/jpeg")
    with pytest.raises(InvalidMedia) as refused_apart:
        await apart.look(cut, "image 2", "image")
    assert refused_apart.value.message == refused.value.message
    with pytest.raises(
        InvalidMedia, match=r"image 2 needs more memory|looking at image 2 took too"
    ):
        await Looks(MolmoSettings(probe_memory_bytes=8_000_000), lambda: None).look(
            good, "image 2", "image"
        )


async def test_frame_times_are_those_of_training() -> None:
    url = data_url(video(n_frames=40, rate=25), "video/mp4")
    checked = await MediaGate(SETTINGS).check([], [url])
    checked = checked.sampled(VideoGeometry(max_frames=384, max_fps=2.0))

    assert checked.video is not None
    assert checked.video.frame_times_s == pytest.approx((0.0, 0.5, 1.0, 1.5, 1.6))


def test_the_probe_ends_itself_when_it_needs_too_much_time() -> None:
    """Its limit does not depend on the service's being alive."""
    costs = '{"memory_bytes": 4000000000, "cpu_s": 1}'
    limits = '{"max_duration_s": 9, "max_side_px": 999, "max_frames": 9}'
    code = (
        "import sys, molmo_server.media.probe as p\n"
        "def spin(*_):\n    while True: pass\n"
        "p.look_at = spin\np.main(sys.argv[1:])"
    )

    arguments = ("video", "the video", costs, limits)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], input=b"", timeout=60)

    assert ended.returncode < 0
