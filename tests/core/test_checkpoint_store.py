"""The store: a publisher may die at any moment, a reader never sees anything but whole folders."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo_core.checkpoints import MANIFEST, FolderStore, Manifest, leases
from molmo_core.errors import CheckpointError

FACTS: dict[str, Any] = {
    "source": "run",
    "code_version": "0",
    "created": 0.0,
    "bidirectional": "all",
}
FILES = ("config.json", "model-1.safetensors", "model-2.safetensors", "code/modeling.py")


def publish(store: FolderStore, seed: int, name: str = "tiny") -> Manifest:
    rng = random.Random(seed)
    with store.staging() as staged:
        folder = staged / "checkpoint"
        (folder / "code").mkdir(parents=True)
        for file_name in FILES:
            with builtins.open(folder / file_name, "wb") as file:
                for _ in range(3):
                    file.write(rng.randbytes(2000))
        return store.publish(folder, name=name, step=seed, **FACTS)


def assert_sound(store: FolderStore, allowed: set[str]) -> str:
    """Everything that can be seen is whole; returns the current id."""
    for checkpoint_id in store.ids():
        store.verify(checkpoint_id)
    current = store.current()
    assert current in allowed
    assert current in store.ids()
    return current


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def first(store: FolderStore) -> str:
    return publish(store, 0).id


def test_what_is_published_is_current_and_named_by_its_content(store: FolderStore) -> None:
    assert store.current() is None
    assert store.ids() == []
    one, two = publish(store, 1), publish(store, 2)
    assert store.current() == two.id != one.id
    assert store.ids() == [one.id, two.id]
    assert store.verify(one.id) == one
    assert [f.name for f in one.files] == sorted(FILES)
    assert publish(store, 1).id == one.id  # the same content again
    assert (store.current(), len(store.ids())) == (one.id, 2)
    assert list((store.folder / "staging").iterdir()) == []


# --- a publisher dies ---------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run in a fork; returns the exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fail_at(number: int, fail: Callable[[], None]) -> None:
    """From now on, in this process, `fail` before the `number`-th change of the file system."""
    steps = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if next(steps) == number:
                fail()
            return function(*arguments, **options)

        return wrapper

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    real_open = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = real_open(file, mode, *rest, **options)
        if "w" not in mode:
            return stream
        if next(steps) == number:
            fail()
        raw = stream.buffer if hasattr(stream, "buffer") else stream
        return _Writer(raw, counted(raw.write)) if stream is raw else stream

    builtins.open = io.open = opened


class _Writer:
    """A file of which every write goes through, unbuffered, a counter."""

    def __init__(self, stream: Any, write: Callable[[bytes], int]) -> None:
        self._stream, self._write = stream, write

    def write(self, content: bytes) -> int:
        half = len(content) // 2  # a write may be cut in the middle
        self._write(content[:half])
        self._stream.flush()
        return half + self._write(content[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_every_write_fsync_and_rename(store: FolderStore, first: str) -> None:
    n_kills = 0
    ids = {first}
    for number in itertools.count():

        def work(number: int = number) -> None:
            fail_at(number, die)
            publish(store, 1000 + number)

        status = in_child(work)
        ids |= set(store.ids())
        assert_sound(store, ids)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        n_kills += 1
    assert n_kills > 40  # files × (open, 6 halves, fsync), folders, manifest, rename, CURRENT
    assert store.current() == store.ids()[-1] != first


def test_killed_at_random_moments(store: FolderStore, first: str) -> None:
    rng = random.Random(3)
    began = time.perf_counter()
    publish(store, 1)
    longest_s = 1.5 * (time.perf_counter() - began)
    ids, n_killed = {first, *store.ids()}, 0
    for number in range(300):
        pid = os.fork()
        if pid == 0:
            try:
                for seed in itertools.count(10_000 + 1000 * number):
                    publish(store, seed)
                    store.retire(4)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, longest_s))
        os.kill(pid, signal.SIGKILL)
        n_killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        ids |= set(store.ids())
        assert_sound(store, ids)
    assert n_killed == 300


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_old_one(store: FolderStore, first: str, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    n_failures = 0
    for number in range(0, 200, 3):

        def work(number: int = number) -> None:
            fail_at(number, fail)
            publish(store, 500 + number)

        if in_child(work) == 0:
            break
        n_failures += 1
        assert_sound(store, {first, *store.ids()})
    assert n_failures > 10


def test_no_room_for_a_file(store: FolderStore, first: str) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        publish(store, 1)

    assert in_child(work) == 1
    assert assert_sound(store, {first}) == first
    assert store.ids() == [first]


def test_publishers_at_the_same_time(store: FolderStore, first: str) -> None:
    pids = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                for round_ in range(5):
                    publish(store, 10 + 100 * (number // 2) + round_)  # two and two the same
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(store.ids()) == 1 + 15
    assert assert_sound(store, set(store.ids())) != first


# --- what is altered is refused -----------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_and_a_cut_file_are_found(store: FolderStore, first: str, name: str) -> None:
    path = store.folder_of(first) / name
    whole = path.read_bytes()
    position = random.Random(name).randrange(len(whole))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    with pytest.raises(CheckpointError, match=f"{name} of {first} is not what was published"):
        store.verify(first)
    path.write_bytes(whole[:position])
    with pytest.raises(CheckpointError, match=f"{name} of {first} has {position} bytes, its man"):
        store.set_current(first)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks \['{name}'\] and holds nothing"):
        store.verify(first)
    path.write_bytes(whole)
    store.verify(first)


def test_foreign_files_links_and_other_manifests_are_refused(
    store: FolderStore, first: str
) -> None:
    second = publish(store, 1).id
    folder = store.folder_of(first)
    (folder / "evil.py").touch()
    with pytest.raises(CheckpointError, match=r"holds \['evil.py'\] that its manifest"):
        store.verify(first)
    (folder / "evil.py").unlink()
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="which are no plain files"):
        store.verify(first)
    (folder / "link").unlink()
    manifest = folder / MANIFEST
    manifest.write_bytes((store.folder_of(second) / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError, match=f"the manifest of {first} is that of {second}"):
        store.verify(first)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json of .* cannot be read"):
        store.verify(first)
    manifest.unlink()
    with pytest.raises(CheckpointError, match="it was not published, or not to its end"):
        store.set_current(first)
    assert store.current() == second


@pytest.mark.parametrize("content", ["", "../../etc", "a b", "x" * 200, "\x00"])
def test_a_pointer_that_is_no_id_is_refused(store: FolderStore, first: str, content: str) -> None:
    (store.folder / "CURRENT").write_text(content)
    with pytest.raises(CheckpointError, match="which is no id"):
        store.current()


def test_an_unknown_id_names_those_that_are_there(store: FolderStore, first: str) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint 'other'; the last ones are: {first}"):
        store.folder_of("other")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.folder_of("..")
    with pytest.raises(CheckpointError, match="allowed are letters"):
        publish(store, 1, name="../up")


# --- retention ----------------------------------------------------------------------------------


def test_retention_leaves_what_is_current_or_served(store: FolderStore, first: str) -> None:
    ids = [first, *(publish(store, seed).id for seed in range(1, 7))]
    store.hold("server-1", [ids[1]])
    store.set_current(ids[2])
    assert store.retire(2) == [ids[0], ids[3], ids[4]]
    assert set(store.ids()) == {ids[1], ids[2], ids[5], ids[6]}
    store.release("server-1")
    assert store.retire(1) == [ids[1], ids[5]]
    assert set(store.ids()) == {ids[2], ids[6]}
    with pytest.raises(ValueError, match="at least one"):
        store.retire(0)


def test_a_lease_ends_by_itself_and_a_damaged_one_stops_retention(
    store: FolderStore, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = publish(store, 1).id
    store.hold("server-1", [first])
    assert store.live() == {first}
    monkeypatch.setattr(leases.time, "time", lambda: 4e9)
    assert store.live() == set()
    (store.folder / "live" / "server-1.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lease server-1\.json cannot be read"):
        store.retire(1)
    assert set(store.ids()) == {first, second}


def test_what_dead_publishers_left_is_removed_after_a_day(store: FolderStore, first: str) -> None:
    left, fresh = store.folder / "staging" / "left", store.folder / "staging" / "fresh"
    left.mkdir()
    fresh.mkdir()
    day_ago = time.time() - 25 * 3600
    os.utime(left, (day_ago, day_ago))
    publish(store, 1)
    assert not left.exists()
    assert fresh.exists()
