"""Checkpoints of a store on the server's machine: native ones are converted by a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from molmo_core import __version__
from molmo_core.checkpoints import MANIFEST, FolderStore, ObjectStore, check_files, read_manifest
from molmo_core.errors import CheckpointError
from molmo_server.checkpoints import local
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.checkpoints.publish import publish, publish_as_it_is
from tests.support.gateway import until

NATIVE = Path(__file__).parents[1] / "golden" / "native"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[FolderStore, str]:
    """A store whose current checkpoint is Ai2's sharded form, tokenizer included."""
    store = FolderStore(tmp_path_factory.mktemp("store"))
    manifest = publish_as_it_is(
        NATIVE / "olmo3", store, name="native", tokenizer=str(NATIVE / "tokenizer")
    )
    assert len(manifest.probes) == 3
    return store, manifest.id


def test_a_native_checkpoint_is_converted_once_and_keeps_its_id(
    stored: tuple[FolderStore, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, native_id = stored
    phases: list[str] = []
    checkpoints = LocalCheckpoints(store, tmp_path)
    folder, manifest = checkpoints.bring(native_id, phases.append)
    assert phases[0] == "verifying"
    assert phases[1].startswith("converting, ")
    assert manifest == read_manifest(folder)
    assert (manifest.id, manifest.probes) == (native_id, store.manifest(native_id).probes)
    check_files(folder, manifest)
    assert (folder / "config.json").exists()
    source, converted = open_checkpoint(NATIVE / "olmo3"), open_checkpoint(folder)
    for name in source.weights.shapes():
        assert torch.equal(source.weights.read(name), converted.weights.read(name))
    assert [p.name for p in (tmp_path / "converted").iterdir()] == [f"{native_id}-{__version__}"]
    monkeypatch.setattr(subprocess, "Popen", None)  # not again
    assert checkpoints.bring(native_id, phases.append)[0] == folder


def test_a_conversion_that_was_altered_is_made_anew(
    stored: tuple[FolderStore, str], tmp_path: Path
) -> None:
    store, native_id = stored
    checkpoints = LocalCheckpoints(store, tmp_path)
    folder, manifest = checkpoints.bring(native_id, lambda phase: None)
    (folder / "config.json").write_text("{}")
    folder, again = checkpoints.bring(native_id, lambda phase: None)
    assert again == manifest
    check_files(folder, again)


def test_what_cannot_be_converted_is_told_in_the_importers_words(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    with store.staging() as staged:
        broken = staged / "checkpoint"
        shutil.copytree(NATIVE / "qwen3_tied-unsharded", broken)
        shutil.copytree(NATIVE / "tokenizer", broken / "tokenizer")
        weights = next(broken.glob("*.pt"))
        weights.write_bytes(weights.read_bytes()[:5000])
        facts = {"source": "x", "code_version": "0", "created": 0.0, "bidirectional": "all"}
        broken_id = store.publish(broken, name="broken", **facts).id
    with pytest.raises(CheckpointError, match=r"cannot be converted: .*model\.pt"):
        LocalCheckpoints(store, tmp_path / "cache").bring(broken_id, lambda phase: None)
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


def test_a_service_that_ends_waits_for_no_conversion(
    stored: tuple[FolderStore, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, native_id = stored
    checkpoints = LocalCheckpoints(store, tmp_path)
    monkeypatch.setattr(local, "_IMPORTER", ("-c", "import time; time.sleep(60)"))
    said: list[str] = []

    def bring() -> None:
        try:
            checkpoints.bring(native_id, said.append)
        except CheckpointError as error:
            said.append(error.message)

    bringing = threading.Thread(target=bring)
    bringing.start()
    until(lambda: len(said) > 1)
    checkpoints.abandon()
    bringing.join(timeout=10)
    assert not bringing.is_alive()
    assert said[-1] == "the conversion was broken off: the service is ending"


def test_an_object_stores_checkpoint_is_brought_as_it_was_published(tmp_path: Path) -> None:
    store = ObjectStore("memory://local", cache=tmp_path / "cache")
    published = publish(
        NATIVE / "olmo3", store, name="tiny", tokenizer=str(NATIVE / "tokenizer"), with_probes=False
    )
    folder, manifest = LocalCheckpoints(store, tmp_path).bring(published.id, lambda phase: None)
    assert manifest == published
    assert folder == tmp_path / "cache" / published.id
    assert (folder / MANIFEST).exists()
    source = open_checkpoint(NATIVE / "olmo3")
    name = next(iter(source.weights.shapes()))
    assert torch.equal(source.weights.read(name), open_checkpoint(folder).weights.read(name))


def test_what_nobody_uses_for_a_day_is_removed(tmp_path: Path) -> None:
    checkpoints = LocalCheckpoints(FolderStore(tmp_path / "store"), tmp_path)
    a_day_ago = time.time() - 25 * 3600
    kept = [tmp_path / "store" / "held", tmp_path / "converted" / f"held-{__version__}"]
    fresh, old = tmp_path / "converted" / "fresh", tmp_path / "store" / ".broken-off"
    for folder in (*kept, fresh, old):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("x")
        if folder is not fresh:
            os.utime(folder, (a_day_ago, a_day_ago))
    for _ in range(2):
        checkpoints.tidy({"held"})
    assert all(folder.exists() for folder in (*kept, fresh))
    assert not old.exists()
