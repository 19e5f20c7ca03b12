"""Uploaded files on disk: their time, their quota, and what a crash leaves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import Busy, InvalidMedia, MediaNotFound
from molmo_server.media.look import digest
from molmo_server.media.spool import Spool
from molmo_server.settings import MolmoSettings

KIB = 1024


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Spools:
    """Spools over one folder, as one server after another has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self._open: list[Spool] = []

    def start(self, **settings: Any) -> Spool:
        asked = MolmoSettings(**{"media_dir": self.folder, "media_ttl_s": 100, **settings})
        spool = Spool(asked, clock=self.clock)
        spool.start()
        self._open.append(spool)
        return spool

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def close(self) -> None:
        for spool in self._open:
            spool.close()


@pytest.fixture
def spools(tmp_path: Path) -> Iterator[Spools]:
    made = Spools(tmp_path / "media")
    yield made
    made.close()


def id_of(data: bytes) -> str:
    return f"media-{digest(data)[:32]}"


async def put(spool: Spool, *files: bytes, owner: str = "") -> list[str]:
    return [(await spool.put(digest(data), data, owner)).id for data in files]


async def test_the_same_bytes_are_one_file(spools: Spools) -> None:
    spool = spools.start()

    first, second = await put(spool, b"cat", b"cat")

    assert first == second == id_of(b"cat")
    assert spools.names() == [first]
    assert spool.n_bytes == 3
    assert (spools.folder / first).read_bytes() == b"cat"
    assert (spools.folder / first).stat().st_mode & 0o777 == 0o600
    assert spools.folder.stat().st_mode & 0o777 == 0o700


async def test_the_same_bytes_at_the_same_time_are_one_file(spools: Spools) -> None:
    spool = spools.start()

    await asyncio.gather(put(spool, b"cat"), put(spool, b"cat"), put(spool, b"dog"))

    assert spools.names() == sorted([id_of(b"cat"), id_of(b"dog")])
    assert spool.n_bytes == 6


async def test_a_file_goes_when_it_was_not_used_for_its_time(spools: Spools) -> None:
    spool = spools.start()
    used, unused, again = await put(spool, b"used", b"unused", b"again")

    spools.clock.now_s += 60
    assert (await spool.read(used))[0] == b"used"
    assert (await put(spool, b"again")) == [again]
    spools.clock.now_s += 60

    assert spool.find(used).expires_at_s == spools.clock.now_s + 40
    assert spool.find(again).created_at_s == spools.clock.now_s - 120
    with pytest.raises(MediaNotFound, match="was not used for 100 s; upload it with POST"):
        await spool.read(unused)
    assert spools.names() == sorted([used, again])
    spools.clock.now_s += 41
    with pytest.raises(MediaNotFound):
        spool.find(used)
    assert (spools.names(), spool.n_bytes) == ([], 0)


async def test_above_the_quota_the_least_recently_used_go(spools: Spools) -> None:
    spool = spools.start(media_quota_bytes=3 * KIB)
    files = [bytes([k]) * KIB for k in range(5)]
    a, b, c = await put(spool, *files[:3])
    await spool.read(a)

    [d] = await put(spool, files[3])
    assert spools.names() == sorted([a, c, d])
    [e] = await put(spool, files[4] * 2)
    assert spools.names() == sorted([d, e])
    assert spool.n_bytes == 3 * KIB
    with pytest.raises(MediaNotFound):
        spool.find(b)


async def test_the_same_file_twice_at_once_takes_its_room_once(spools: Spools) -> None:
    spool = spools.start(media_quota_bytes=2 * KIB)
    [other] = await put(spool, b"o" * KIB)

    [first], [second] = await asyncio.gather(put(spool, b"t" * KIB), put(spool, b"t" * KIB))

    assert first == second
    assert (spools.names(), spool.n_bytes) == (sorted([first, other]), 2 * KIB)
    assert (await spool.read(first))[0] == b"t" * KIB


async def test_each_owner_has_a_quota(spools: Spools) -> None:
    spool = spools.start(media_quota_bytes=2 * KIB)
    files = [bytes([k]) * KIB for k in range(4)]
    [theirs] = await put(spool, files[0], owner="theirs")
    [of_nobody] = await put(spool, files[0])

    mine = await put(spool, *files, owner="mine")

    assert spool.n_bytes == 4 * KIB
    for one in (spool, spools.start(media_quota_bytes=2 * KIB)):
        assert one.find(theirs, "theirs").n_bytes == one.find(of_nobody).n_bytes == KIB
        assert [one.find(kept, "mine").id for kept in mine[2:]] == mine[2:]
        with pytest.raises(MediaNotFound):
            one.find(mine[1], "mine")
    assert spools.start(media_quota_bytes=KIB).n_bytes == 3 * KIB


async def test_a_file_larger_than_the_quota_drives_no_other_out(spools: Spools) -> None:
    spool = spools.start(media_quota_bytes=KIB)
    [small] = await put(spool, b"small")

    with pytest.raises(
        InvalidMedia, match=r"has 1,025 bytes, this server keeps 1,024 of one caller in all;"
    ):
        await put(spool, bytes(KIB + 1))

    assert spools.names() == [small]


async def test_a_file_that_is_being_read_stays_whole(spools: Spools) -> None:
    spool = spools.start(media_quota_bytes=KIB)
    data = b"x" * KIB
    [evicted] = await put(spool, data)

    with spool.open(evicted) as file:
        [deleted] = await put(spool, b"y" * KIB)
        with spool.open(deleted) as other:
            spool.delete(deleted)
            assert spools.names() == []
            assert file.read() == data
            assert other.read() == b"y" * KIB


async def test_a_restart_keeps_files_their_times_and_their_order(spools: Spools) -> None:
    a, b, c = await put(spools.start(), b"a", b"b", b"c")
    spools.clock.now_s += 10
    first = spools.start()
    await first.read(a)
    spools.clock.now_s += 10

    spool = spools.start()

    assert spool.n_bytes == 3
    assert spool.find(a).created_at_s == spools.clock.now_s - 20
    assert spool.find(a).expires_at_s == spools.clock.now_s + 90
    assert spool.find(b).expires_at_s == spools.clock.now_s + 80
    assert (await spool.read(c))[0] == b"c"
    smaller = spools.start(media_quota_bytes=2)
    assert spools.names() == sorted([a, c])
    assert smaller.n_bytes == 2
    spools.clock.now_s += 1000
    assert spools.start().n_bytes == 0
    assert spools.names() == []


async def test_what_a_crash_leaves_is_swept_and_what_is_not_ours_stays(
    spools: Spools, tmp_path: Path
) -> None:
    [whole] = await put(spools.start(), b"whole")
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"secret")
    (spools.folder / ".part-0123").write_bytes(b"hal")
    (spools.folder / "notes.txt").write_bytes(b"mine")
    (spools.folder / f"{id_of(b'x')}.png").write_bytes(b"x")
    link = spools.folder / id_of(b"secret")
    link.symlink_to(foreign)

    spool = spools.start()

    assert spools.names() == sorted([whole, "notes.txt", f"{id_of(b'x')}.png", link.name])
    assert spool.n_bytes == 5
    with pytest.raises(MediaNotFound):
        await spool.read(link.name)


async def test_a_write_that_fails_leaves_nothing(
    spools: Spools, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spools.start()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(Busy, match=r"disk does not take the file \(No space left"):
        await put(spool, b"cat")
    monkeypatch.undo()

    assert (spools.names(), spool.n_bytes) == ([], 0)
    [media_id] = await put(spool, b"cat")
    assert await spool.read(media_id) == (b"cat", digest(b"cat"))


@pytest.mark.parametrize("harm", ["torn", "altered", "gone"])
async def test_a_file_that_is_not_what_its_id_says_is_none(spools: Spools, harm: str) -> None:
    spool = spools.start()
    [media_id] = await put(spool, b"cat")
    path = spools.folder / media_id
    if harm == "gone":
        path.unlink()
    else:
        os.truncate(path, 1) if harm == "torn" else path.write_bytes(b"dog")

    with pytest.raises(MediaNotFound):
        await spool.read(media_id)

    assert (spools.names(), spool.n_bytes) == ([], 0)
    assert await put(spool, b"cat") == [media_id]
    assert (await spool.read(media_id))[0] == b"cat"


@pytest.mark.parametrize(
    "name",
    ["", "media-", "../secret", "/etc/passwd", ".part-0123", "media-" + "0" * 32, "media-\0", "."],
)
async def test_names_that_are_no_ids(spools: Spools, name: str) -> None:
    spool = spools.start()
    (spools.folder.parent / "secret").write_bytes(b"secret")

    for ask in (spool.find, spool.open, spool.delete):
        with pytest.raises(MediaNotFound, match="there is no uploaded file"):
            ask(name)
    assert (spools.folder.parent / "secret").exists()


async def test_a_temporary_folder_goes_at_the_end() -> None:
    spool = Spool(MolmoSettings())
    spool.start()
    [media_id] = await put(spool, b"cat")
    with spool.open(media_id) as file:
        folder = Path(str(file.name)).parent

    assert folder.stat().st_mode & 0o777 == 0o700
    spool.close()

    assert not folder.exists()
