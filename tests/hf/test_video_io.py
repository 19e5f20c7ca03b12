"""Chosen frames of real files, against frames whose number is drawn into them."""

from __future__ import annotations

import io
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest

from molmo_core.errors import InvalidMedia
from molmo_core.videos import VideoGeometry, probe_video, sample_times
from molmo_hf import video_io

BITS = 8
CELL = 16


def numbered_frame(number: int) -> np.ndarray:
    """The frame number in binary: a row of white or black cells over a mid-grey field."""
    frame = np.full((64, BITS * CELL, 3), 128, dtype=np.uint8)
    for bit in range(BITS):
        frame[:32, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
    return frame


def read_number(frame: np.ndarray) -> int:
    row = frame[frame.shape[0] // 4]
    cells = row.reshape(BITS, -1, 3).mean(axis=(1, 2))
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells))


def encode(n_frames: int, rate: Fraction, *, gaps: dict[int, int] | None = None) -> bytes:
    """H.264 with B-frames and a keyframe every 48; `gaps` delays a frame by whole frame times."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "g": "48"})
        stream.width, stream.height, stream.pix_fmt = BITS * CELL, 64, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        delay = 0
        for number in range(n_frames):
            delay += (gaps or {}).get(number, 0)
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number + delay, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(params=["torchcodec", "pyav"])
def decoder(request, monkeypatch):
    """Both ways, the fallback as on a machine where torchcodec does not load."""
    if request.param == "torchcodec":
        assert video_io._has_torchcodec()
    else:
        monkeypatch.setattr(video_io, "_has_torchcodec", lambda: False)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001)])
def test_each_target_time_gets_the_frame_displayed_then(rate):
    source = encode(130, rate)
    info = probe_video(source)
    times = sample_times(info.duration_s, VideoGeometry(), source_fps=info.fps)
    numbers = [read_number(f) for f in video_io.decode_frames(source, times)]
    assert numbers == [min(int(t * rate + Fraction(1, 10**5)), 129) for t in times]
    assert numbers[-1] == 129, "the last time is the end, at which the last frame stands"


@pytest.mark.usefixtures("decoder")
def test_long_gaps_between_frames_are_sought_over():
    source = encode(250, Fraction(24))
    times = [0.0, 0.5, 5.2, 9.9, 10.2]
    numbers = [read_number(f) for f in video_io.decode_frames(source, times)]
    assert numbers == [0, 12, 124, 237, 244]


@pytest.mark.usefixtures("decoder")
def test_variable_frame_rate_follows_the_display_times():
    source = encode(40, Fraction(20), gaps={10: 40})  # frame 9 stands for two seconds more
    times = [0.4, 0.5, 1.5, 2.44, 2.5, 3.0]
    numbers = [read_number(f) for f in video_io.decode_frames(source, times)]
    assert numbers == [8, 9, 9, 9, 10, 20]


@pytest.mark.usefixtures("decoder")
def test_frames_come_in_the_order_asked_and_repeat():
    source = encode(30, Fraction(10))
    frames = video_io.decode_frames(source, [2.0, 0.1, 2.0, 9.0])
    assert [read_number(f) for f in frames] == [20, 1, 20, 29]


@pytest.mark.usefixtures("decoder")
def test_frames_are_resized_as_they_come(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(20, Fraction(10)))
    frames = video_io.decode_frames(path, [0.0, 1.0], size_hw=(32, 32))
    assert frames.shape == (2, 32, 32, 3)
    assert frames.dtype == np.uint8


@pytest.mark.usefixtures("decoder")
def test_a_turned_video_comes_upright(tmp_path):
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    plain.write_bytes(encode(5, Fraction(10)))
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", plain, "-c", "copy", "-metadata:s:v", "rotate=90", turned],
        check=True,
    )
    frame = video_io.decode_frames(turned, [0.3])[0]
    assert frame.shape == (BITS * CELL, 64, 3)
    assert read_number(np.rot90(frame, k=-1)) == 3


@pytest.mark.usefixtures("decoder")
def test_damaged_frames_are_the_callers_fault():
    source = bytearray(encode(60, Fraction(10)))
    info = probe_video(bytes(source))
    begin = source.index(b"mdat") + 4
    source[begin : begin + 6000] = bytes(6000)
    with pytest.raises(InvalidMedia, match=r"the video .* complete"):
        video_io.decode_frames(bytes(source), [0.0, 3.0], info=info)


@pytest.mark.parametrize(
    ("container", "codec", "pixels", "options"),
    [
        ("mp4", "libx264", "yuv420p", {"bf": "7", "g": "40"}),
        ("mp4", "libx264", "yuv420p", {"tune": "zerolatency"}),
        ("mp4", "libx264", "yuvj422p", {"x264-params": "interlaced=1"}),
        ("mp4", "libx264", "yuv420p10le", {}),
        ("mp4", "libx264", "gray", {}),
        ("matroska", "libx264", "yuv420p", {}),
        ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
        ("webm", "libvpx-vp9", "yuv420p", {}),
    ],
)
def test_what_is_opened_in_haste_has_the_same_frames(container, codec, pixels, options):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as written:
        if container == "mp4":
            written.add_stream("aac", rate=48000)  # in front of the pictures
        stream = written.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = BITS * CELL, 64, pixels
        for number in range(80):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            written.mux(stream.encode(frame))
        written.mux(stream.encode())
    file, geometry = buffer.getvalue(), VideoGeometry(crop_px=126)
    info, times, frames = video_io.sample_file(file, geometry)
    assert info == probe_video(file)
    expected = video_io.decode_frames(file, times.file_s, size_hw=(126, 126))
    np.testing.assert_array_equal(frames, expected)
    numbers = [read_number(f) for f in video_io.decode_frames(file, times.file_s)]
    assert numbers == [0, 12, 25, 37, 50, 62, 75, 79]


def test_a_file_without_an_order_of_frames_in_its_header_is_opened_once_more(monkeypatch):
    opened = []
    original = video_io.opened_video

    def noted(source, **how):
        opened.append(how)
        return original(source, **how)

    monkeypatch.setattr(video_io, "opened_video", noted)
    source = encode(40, Fraction(10))
    video_io.sample_file(source, VideoGeometry())
    assert opened == [{"believes_header": True}]
    monkeypatch.setattr(video_io, "_8_BITS", frozenset())
    frames = video_io.sample_file(source, VideoGeometry()).frames
    assert opened[1:] == [{"believes_header": True}, {}]
    assert len(frames) == 9
