"""Files that cost whoever opens them more than they weigh: the gateway's memory stays as it is.

The gateway is a process of its own, as `molmo serve` starts it; the peak of its memory is what the
system measured. The child that looks at a file is limited by itself (`test_media`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.server.bombs import PICTURES, VIDEOS
from tests.server.media import data_url, picture
from tests.server.test_serve import address_of, serve_fake, started

MOST_MIB = 300
LONGEST_S = 2.0
SLACK = 4
"""A machine that runs other tests as well is slower."""


@dataclass(frozen=True, kw_only=True)
class Process:
    http: httpx2.Client
    pid: int
    idle_mib: float

    def peak_mib(self) -> float:
        """Above what it had when it was idle, since the last `forget_peak`."""
        return memory_mib(self.pid, "VmHWM") - self.idle_mib

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


def memory_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


@pytest.fixture(scope="module")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    scratch = tmp_path_factory.mktemp("bombs")
    with started(serve_fake(folder, scratch)) as server:
        address, _ = address_of(server)
        with httpx2.Client(base_url=address, timeout=60) as http:
            body = {"image_url": data_url(picture()), "object": "x"}
            assert http.post("/v1/point", json=body).status_code == 200
            idle_mib = memory_mib(server.pid, "VmRSS")
            yield Process(http=http, pid=server.pid, idle_mib=idle_mib)
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.parametrize("name", [*PICTURES, *VIDEOS])
def test_a_bomb_costs_the_gateway_nothing(process: Process, name: str) -> None:
    data = (PICTURES | VIDEOS)[name]()
    kind = "video/mp4" if name in VIDEOS else "image/png"
    process.forget_peak()
    began = time.monotonic()

    response = process.http.post("/v1/media", content=data, headers={"content-type": kind})

    took_s, peak_mib = time.monotonic() - began, process.peak_mib()
    print(  # noqa: T201
        f"{name}: {len(data):,} bytes, {response.status_code}, {took_s:.2f} s, {peak_mib:.0f} MiB"
    )
    assert response.status_code in (200, 400), response.text
    assert peak_mib < MOST_MIB
    assert took_s < LONGEST_S * SLACK
    assert process.http.get("/health").status_code == 200


def test_what_is_said_of_them(process: Process) -> None:
    for name, says in (
        ("png of 50,000 x 50,000", "allowed are 50,000,000 pixels"),
        ("png with 200 MB of text", "damaged"),
        ("packed tiff", "not a picture"),
        ("tiff", "not a picture"),
        ("video of 150,000 frames", "more than 100,000 frames"),
        ("video that says it has a million frames", "the video"),
    ):
        data = (PICTURES | VIDEOS)[name]()
        kind = "video/mp4" if name in VIDEOS else "image/png"
        response = process.http.post("/v1/media", content=data, headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_media")
        assert says in response.json()["error"]["message"], name
