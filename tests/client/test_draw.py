"""Dots are drawn where the points are, on pictures and on every frame of videos."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from molmo_client.draw import PALETTE, Style, colour_of, draw_points, save_image, shown_label
from molmo_client.draw_video import draw_tracks, tracks_of_points
from molmo_core.api import Pixel, Point, Track, TrackPoint
from molmo_core.errors import InvalidMedia

NOWHERE = Pixel(x=0, y=0)
GREY = (128, 128, 128)


def point(x: float, y: float, label: str | None = "dot", **fields: object) -> Point:
    given = {"id": 1, "media_index": 0, "span": (0, 0), **fields}
    return Point(x=x, y=y, label=label, pixel=NOWHERE, **given)


def track(*places: tuple[float, float, float], number: int = 1) -> Track:
    """`places` are (seconds, x, y)."""
    points = [TrackPoint(t=t, frame=0, x=x, y=y, pixel=NOWHERE) for t, x, y in places]
    return Track(id=number, label="ball", points=points)


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(160, 320), (640, 480), (1024, 512)])
@pytest.mark.parametrize(("x", "y"), [(0.5, 0.5), (0.25, 0.1), (0.9, 0.75)])
def test_a_dot_is_centred_on_its_point(size: tuple[int, int], x: float, y: float) -> None:
    drawn = np.asarray(draw_points(Image.new("RGB", size, GREY), [point(x, y)]))[: size[1]]
    radius_px = Style.for_size(*size).dot_radius_px
    ys, xs = np.nonzero((drawn == PALETTE[0]).all(axis=2))
    near = np.hypot(xs - x * size[0], ys - y * size[1]) <= radius_px + 1
    assert np.hypot(xs[near].mean() - x * size[0], ys[near].mean() - y * size[1]) < 1.0
    assert near.sum() == pytest.approx(np.pi * radius_px**2, rel=0.3)


def test_labels_have_colours_and_lines_in_the_legend() -> None:
    points = [point(0.2, 0.5, "cat"), point(0.5, 0.5, "dog", id=2), point(0.8, 0.5, "cat", id=3)]
    drawn = np.asarray(draw_points(Image.new("RGB", (400, 200), GREY), points))
    assert [tuple(drawn[100, x]) for x in (80, 200, 320)] == [
        PALETTE[0],
        PALETTE[1],
        PALETTE[0],
    ]
    legend = drawn[200:]
    assert len(legend) > 0
    assert all((legend == PALETTE[k]).all(axis=2).any() for k in (0, 1))


def test_only_points_of_this_picture_are_drawn_and_the_input_stays() -> None:
    original = Image.new("RGB", (100, 100), GREY)
    drawn = draw_points(original, [point(0.5, 0.5, media_index=1)])
    assert drawn.size == (100, 100)
    assert (np.asarray(drawn) == 128).all()
    draw_points(original, [point(0.5, 0.5)])
    assert (np.asarray(original) == 128).all()


def test_a_turned_photograph_is_drawn_as_it_is_displayed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed a quarter turn clockwise
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), GREY).save(buffer, "JPEG", exif=exif)
    drawn = draw_points(buffer.getvalue(), [point(0.5, 0.25)])
    assert drawn.width == 100
    assert tuple(np.asarray(drawn)[50, 50]) == PALETTE[0]


def test_points_at_the_edge_and_strange_labels_are_drawn() -> None:
    label = "a\n" * 100 + "\x1b[31m ☃ 猫"
    points = [point(x, y, label) for x in (0.0, 1.0) for y in (0.0, 1.0)]
    assert draw_points(Image.new("L", (20, 20)), [*points, point(0.5, 0.5, None)]).width == 20
    assert len(shown_label(label)) == 60
    assert shown_label("") == "point"
    assert colour_of(len(PALETTE)) == PALETTE[0]


def test_what_cannot_be_drawn_on(tmp_path: Path) -> None:
    with pytest.raises(InvalidMedia, match="picture at hand"):
        draw_points("https://x/cat.png", [])
    with pytest.raises(InvalidMedia, match="cannot draw on the picture"):
        draw_points(b"\x89PNG\r\n\x1a\n123", [])
    with pytest.raises(InvalidMedia, match=r"name a \.png or \.jpg"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "picture.what")


# --- videos -----------------------------------------------------------------------------------


def write_video(path: Path, n_frames: int, rate: Fraction, size: tuple[int, int]) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        frame = np.full((size[1], size[0], 3), 128, dtype=np.uint8)
        for _ in range(n_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> tuple[list[float], list[np.ndarray]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.time for frame in frames], [f.to_ndarray(format="rgb24") for f in frames]


def dot_of(frame: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float] | None:
    """(x, y) in 0-1 of the middle of everything in about this colour."""
    near = (np.abs(frame.astype(int) - colour) < 50).all(axis=2)
    ys, xs = np.nonzero(near)
    if len(xs) < 5:
        return None
    return (xs.mean() + 0.5) / frame.shape[1], (ys.mean() + 0.5) / frame.shape[0]


def test_a_dot_follows_its_track(tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    source = write_video(tmp_path / "in.mp4", 75, rate, (320, 240))
    moving = track((0.0, 0.2, 0.5), (0.5, 0.4, 0.5), (1.0, 0.6, 0.5))
    assert draw_tracks(source, [moving], tmp_path / "out.mp4") == 75
    times_s, frames = read_video(tmp_path / "out.mp4")
    assert times_s == pytest.approx([float(k / rate) for k in range(75)], abs=1e-3)
    tops = [frame[: frame.shape[0] // 2 + 2] for frame in frames]
    for k in (0, 15, 29):  # the trail runs behind the dot, its right end is the dot
        xs = np.nonzero((np.abs(tops[k].astype(int) - PALETTE[0]) < 60).all(axis=2))[1]
        expected_px = (0.2 + 0.4 * times_s[k]) * 320
        assert expected_px <= xs.max() <= expected_px + 30
    assert dot_of(frames[-1], PALETTE[0]) is None  # the trail has faded too


def test_a_dot_is_not_shown_in_a_gap(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4", 75, Fraction(25), (160, 160))
    seen = track(*[(0.5 * k, 0.5, 0.5) for k in range(6)])
    lost = track((0.0, 0.5, 0.2), (0.5, 0.5, 0.2), (2.5, 0.5, 0.2), number=2)
    draw_tracks(source, [seen, lost], tmp_path / "out.mp4")
    _, frames = read_video(tmp_path / "out.mp4")
    shown = [dot_of(frames[index][:50], PALETTE[1]) is not None for index in (5, 35, 62)]
    assert shown == [True, False, True]
    assert dot_of(frames[35], PALETTE[0]) is not None


def turned_clockwise(mp4: bytes, *, height_px: int) -> bytes:
    """The same file with a track header that has players turn it by a quarter."""
    begin = mp4.index(b"tkhd") + 44  # the matrix, behind type, version, times, number and volume
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, height_px * one, 0, 1 << 30)
    return mp4[:begin] + matrix + mp4[begin + len(matrix) :]


def test_a_turned_video_is_drawn_as_it_is_displayed(tmp_path: Path) -> None:
    content = write_video(tmp_path / "plain.mp4", 10, Fraction(25), (320, 160)).read_bytes()
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(turned_clockwise(content, height_px=160))
    draw_tracks(turned, [track((0.0, 0.5, 0.25))], tmp_path / "out.mp4")
    _, frames = read_video(tmp_path / "out.mp4")
    assert frames[0].shape == (320, 160, 3)
    place = dot_of(frames[0][:, :90], PALETTE[0])
    assert place is not None
    assert place[1] == pytest.approx(0.25, abs=0.02)


def test_points_of_a_video_become_tracks() -> None:
    points = [
        point(0.2, 0.2, t=1.0, frame=25, id=1),
        point(0.1, 0.1, t=0.0, frame=0, id=1),
        point(0.9, 0.9, t=0.0, frame=0, id=2),
    ]
    first, second = tracks_of_points(points)
    assert [(p.t, p.x) for p in first.points] == [(0.0, 0.1), (1.0, 0.2)]
    assert (second.id, len(second.points)) == (2, 1)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4", 5, Fraction(25), (64, 64))
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[:300])
    out = tmp_path / "out.mp4"
    out.write_bytes(b"before")
    with pytest.raises(InvalidMedia, match=r"cannot draw .*cut\.mp4"):
        draw_tracks(tmp_path / "cut.mp4", [], out)
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "in.mp4", "out.mp4"]
