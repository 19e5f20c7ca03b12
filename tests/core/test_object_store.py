"""A store behind fsspec: what is complete is found, what is not is not, and nothing is believed.

Runs over fsspec's memory and over real files; both are asked through the same calls as S3 is.
"""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from molmo_core.checkpoints import (
    MANIFEST,
    FolderStore,
    Manifest,
    ObjectStore,
    leases,
    object_store,
    open_store,
)
from molmo_core.errors import CheckpointError

FACTS: dict[str, Any] = {"source": "run", "code_version": "0", "bidirectional": "all"}


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    places = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/remote"}
    return ObjectStore(places[request.param], cache=tmp_path / "cache")


def publish(store: ObjectStore, content: str, created: float = 0.0, name: str = "tiny") -> Manifest:
    with store.staging() as staged:
        folder = staged / "checkpoint"
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "weights").write_text(content * 100)
        return store.publish(folder, name=name, created=created, **FACTS)


def remote(store: ObjectStore, *parts: str) -> str:
    return "/".join((store._root, *parts))


def test_what_is_published_is_current_and_comes_back(store: ObjectStore) -> None:
    assert (store.current(), store.ids()) == (None, [])
    first = publish(store, "a", created=1)
    second = publish(store, "b", created=2)
    assert store.ids() == [first.id, second.id]
    assert store.current() == second.id
    folder = store.bring(first.id)
    assert (folder / "deep" / "weights").read_text() == "a" * 100
    assert store.bring(first.id) == folder
    assert store.verify(first.id) == first
    store.set_current(first.id)
    assert store.current() == first.id
    assert publish(store, "b", created=9) == second  # the same content is published once


def test_the_same_place_is_read_by_another_machine(store: ObjectStore, tmp_path: Path) -> None:
    published = publish(store, "a")
    elsewhere = ObjectStore(store.url, cache=tmp_path / "other cache")
    assert elsewhere.current() == published.id
    assert (elsewhere.bring(published.id) / "config.json").read_text() == "{}"


def test_a_publisher_that_dies_at_any_write_leaves_nothing_that_is_seen(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the last object but the pointer: until it is there, there is nothing."""
    old = publish(store, "old")
    files = store._files
    n_writes = 6  # marker, two files, manifest, pointer; then the marker goes

    class Died(BaseException):
        pass

    for number in range(n_writes):
        left = [number]

        def dying(name: str, left: list[int] = left) -> Any:
            real = getattr(files, name)

            def write(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    raise Died
                left[0] -= 1
                return real(*args, **kwargs)

            return write

        with monkeypatch.context() as patch:
            for name in ("pipe_file", "put_file", "rm_file"):
                patch.setattr(files, name, dying(name))
            with pytest.raises(Died):
                publish(store, f"new{number}")
        visible = set(store.ids())
        if number < 4:
            assert visible == {old.id}
        else:
            assert len(visible) == number - 2
            for one in visible:
                store.verify(one)
        assert store.current() == old.id
        store.verify(old.id)
    done = publish(store, "new0")  # what was broken off can be published
    assert store.current() == done.id
    assert (store.bring(done.id) / "deep" / "weights").read_text() == "new0" * 100


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("cut", "300 bytes"),
        ("flip", "its SHA-256 differs"),
        ("gone", "lacks deep/weights"),
        ("manifest", "cannot be read"),
        ("other", "is that of"),
        ("outside", "no file of it"),
    ],
)
def test_what_was_altered_is_never_brought(
    store: ObjectStore, tmp_path: Path, harm: str, why: str
) -> None:
    good, other = publish(store, "good"), publish(store, "othr")
    base = ("checkpoints", good.id)
    weights, manifest = remote(store, *base, "deep/weights"), remote(store, *base, MANIFEST)
    files = store._files
    if harm == "cut":
        files.pipe_file(weights, files.cat_file(weights)[:300])
    elif harm == "flip":
        files.pipe_file(weights, b"x" + files.cat_file(weights)[1:])
    elif harm == "gone":
        files.rm_file(weights)
    elif harm == "manifest":
        files.pipe_file(manifest, files.cat_file(manifest)[:-20])
    elif harm == "other":
        files.pipe_file(manifest, files.cat_file(remote(store, "checkpoints", other.id, MANIFEST)))
    else:
        text = files.cat_file(manifest).replace(b"deep/weights", b"../../weights")
        files.pipe_file(manifest, text)
    with pytest.raises(CheckpointError, match=why):
        store.bring(good.id)
    assert not (tmp_path / "cache" / good.id).exists()
    if harm in ("cut", "gone"):
        with pytest.raises(CheckpointError, match="cut short or was changed"):
            store.set_current(good.id)
    assert store.bring(other.id).is_dir()


def test_what_was_altered_on_this_machine_is_fetched_anew(store: ObjectStore) -> None:
    published = publish(store, "a")
    weights = store.bring(published.id) / "deep" / "weights"
    weights.write_text("z" * 100)
    assert (store.bring(published.id) / "deep" / "weights").read_text() == "a" * 100


def test_retention_leaves_what_is_current_or_served(store: ObjectStore) -> None:
    ids = [publish(store, text, created=k).id for k, text in enumerate("abcd")]
    store.hold("server", [ids[1]])
    store.set_current(ids[0])
    assert store.live() == {ids[1]}
    assert store.retire(1) == [ids[2]]
    assert store.ids() == [ids[0], ids[1], ids[3]]
    store.release("server")
    store.release("server")
    assert store.retire(1) == [ids[1]]
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        store.bring(ids[1])
    with pytest.raises(ValueError, match="keep is 0"):
        store.retire(0)


def test_leases_end_and_damaged_ones_are_told(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish(store, "a")
    store.hold("server", [published.id])
    with monkeypatch.context() as patch:
        patch.setattr(leases.time, "time", lambda: 4e9)
        assert store.live() == set()
    store._files.pipe_file(remote(store, "live", "server.json"), b"{")
    with pytest.raises(CheckpointError, match=r"the lease server\.json cannot be read"):
        store.live()


def test_uploads_that_were_broken_off_are_removed_a_day_later(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish(store, "a")
    marker = remote(store, "checkpoints", "broken-000000000000", ".uploading")
    store._write(b"1000.0", "checkpoints", "broken-000000000000", ".uploading")
    with monkeypatch.context() as patch:
        patch.setattr(object_store.time, "time", lambda: 2000.0)
        store.retire(1)
    assert store._files.exists(marker)
    store.retire(1)
    assert not store._files.exists(marker)
    assert store.ids() == [published.id]


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_publishers_at_once_all_succeed(store: ObjectStore) -> None:
    """Where an object appears as a whole; files are for `FolderStore`."""
    done: list[str] = []
    publishers = [
        threading.Thread(target=lambda text=text: done.append(publish(store, text).id))
        for text in "aabbcc"
    ]
    for one in publishers:
        one.start()
    for one in publishers:
        one.join(timeout=60)
    assert len(done) == 6
    assert sorted(set(done)) == sorted(store.ids())
    assert store.current() in done
    for one in set(done):
        store.verify(one)


@pytest.mark.parametrize("pointer", [b"../../etc", b"", b"\xff\xfe", b"two words"])
def test_a_pointer_that_is_no_id(store: ObjectStore, pointer: bytes) -> None:
    store._write(pointer, "CURRENT")
    with pytest.raises(CheckpointError, match="CURRENT"):
        store.current()


@pytest.mark.parametrize("name", ["../up", "", "a b", "x/y"])
def test_a_name_that_is_none(store: ObjectStore, name: str) -> None:
    with pytest.raises(CheckpointError, match="allowed are letters"):
        publish(store, "a", name=name)


def test_a_place_of_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="as s3fs for s3://"):
        open_store("nowhere://bucket", cache=tmp_path)
    assert isinstance(open_store("memory://bucket", cache=tmp_path), ObjectStore)
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        folder = open_store(where, cache=tmp_path)
        assert isinstance(folder, FolderStore)
        assert folder.folder == tmp_path


def test_a_damaged_manifest_hides_no_others(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = publish(store, "bad"), publish(store, "good")
    store._files.pipe_file(remote(store, "checkpoints", bad.id, MANIFEST), b"{")
    assert store.ids() == [good.id]
    assert f"{bad.id} is left out" in caplog.text
    assert (store.has(bad.id), store.has(good.id), store.has("../up")) == (True, True, False)


def test_what_a_library_raises_of_its_own_is_an_oserror(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EndpointConnectionError(Exception):
        """As botocore's: derived from nothing that says what it is."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise EndpointConnectionError("no route")

    published = publish(store, "a")
    for name in ("cat_file", "pipe_file", "ls", "exists", "get_file"):
        monkeypatch.setattr(store._files, name, unreachable)
    for ask in (
        store.ids,
        lambda: store.bring(published.id),
        lambda: store.hold("server", []),
        lambda: store.has(published.id),
        store.live,
        store.current,
    ):
        with pytest.raises(OSError, match="the store cannot be reached"):
            ask()


def test_a_retirement_that_was_broken_off_is_ended_by_the_next(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = publish(store, "a", created=1), publish(store, "b", created=2)

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._files, "rm", dies)
        with pytest.raises(KeyboardInterrupt):
            store.retire(1)
    assert store.ids() == [new.id]
    weights = remote(store, "checkpoints", old.id, "deep/weights")
    assert store._files.exists(weights)
    store.retire(1)
    assert not store._files.exists(weights)
