"""`molmo train`: a run from the command line, cut and gone on with; what it says before it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_client.__main__ import main
from molmo_core.checkpoints import FolderStore
from molmo_core.errors import CheckpointError
from molmo_training.checkpoints.opened import open_checkpoint
from molmo_training.checkpoints.origin import Origin, read_origin
from molmo_training.commands import configured
from molmo_training.launch import running
from molmo_training.launch.following import EVALUATIONS, Following
from molmo_training.launch.plan import Plan
from molmo_training.parallel.mesh import ALONE
from molmo_training.runs.card import card_of_run
from molmo_training.train_config import SavingConfig

TINY = str(files("molmo_hf") / "checkpoints" / "molmo2-tiny")
SMALL = (
    "n_steps=4",
    "log_every=1",
    "save_every=2",
    "validate_every=2",
    "saving.keep=none",
    "saving.tensorboard=false",
    "compute.n_threads=1",
    "data.n_workers=0",
    "data.packs_per_step=2",
    "data.packs_per_batch=1",
    "data.budgets.n_tokens=384",
    "data.budgets.n_crops=8",
    "data.buffer_size=4",
    "data.held_out.val.n_examples=3",
)


def command(recipe: str, *options: str, settings: tuple[str, ...] = SMALL) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["train", recipe, *options, *sets]


def figures(run: Path) -> dict[str, dict[int, float]]:
    """What was logged, by name and step; how fast it was left out."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if not name.endswith(("_s", "_gb", "_share")) and name != "seconds":
                found.setdefault(name, {})[line["step"]] = value
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in a process of their own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "molmo_client", *command("pretrain-debug", "--run", str(folder))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: step 4 of 4\n"
    assert "step 4/4  loss" in done.stderr
    return folder


def test_a_run_leaves_figures_settings_and_checkpoints(run: Path) -> None:
    found = figures(run)
    assert list(found["loss"]) == [1, 2, 3, 4]
    assert list(found["val/loss"]) == [2, 4]
    assert found["rate/llm"][4] == pytest.approx(2e-3 * 4 / 20)
    assert found["grad_norm/total"][1] > 0
    assert found["probe_loss"][1] > found["probe_loss"][4]
    assert [p.name for p in sorted(run.glob("step*"))] == ["step2", "step4"]
    opened = open_checkpoint(run)
    assert (opened.step, opened.differences()) == (4, [])
    start = running.tiny.build_model(6198).state_dict()
    for name in ("model.transformer.wte.embedding", "lm_head.weight"):
        assert not torch.equal(opened.weights.read(name), start[name])
    card = card_of_run(run, name="small")
    assert sum(card.data_shares.values()) == pytest.approx(1)
    assert "| drawn_captions | 60.00 % |" in card.text()


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "step4")
    assert main(command("pretrain-debug", "--run", str(cut))) == 0
    assert figures(cut) == figures(run)
    whole, again = open_checkpoint(run).weights, open_checkpoint(cut).weights
    for name in whole.shapes():
        assert torch.equal(whole.read(name), again.read(name)), name


def test_a_full_disk_and_a_time_limit_end_a_run_early(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "step4")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
        assert main(command("pretrain-debug", "--run", str(cut))) == 1
    assert "GB are free on the disk of 'run': make room" in capsys.readouterr().err
    assert not (cut / "step4").exists()
    assert main(command("pretrain-debug", "--run", str(cut), "--time-limit", "0.001")) == 0
    assert f"{cut}: step 3 of 4" in capsys.readouterr().out
    assert open_checkpoint(cut).step == 3


def own_pictures(folder: Path, n: int, *, broken: set[int]) -> Path:
    """Rows of which some have a picture that ends in its middle."""
    folder.mkdir()
    lines = []
    for index in range(n):
        file = folder / f"{index}.png"
        noise = np.random.default_rng(index).integers(0, 255, (130, 130, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        if index in broken:
            file.write_bytes(file.read_bytes()[:2000])
        lines.append(json.dumps({"image": file.name, "question": "a", "answer": "b"}) + "\n")
    (folder / "own.jsonl").write_text("".join(lines))
    return folder / "own.jsonl"


def test_too_many_bad_examples_end_a_run_that_can_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = own_pictures(tmp_path / "rows", 24, broken=set(range(0, 24, 2)))
    settings = (*SMALL[:-1], "n_steps=20", "save_every=1000", "data.media.max_frames=4")
    run = tmp_path / "run"
    options = ("--init", TINY, "--data", str(data), "--run", str(run))
    allowed = ("data.n_bad_allowed=4", "data.bad_share_allowed=0")
    assert main(command("finetune", *options, settings=(*settings, *allowed))) == 1
    assert "Repair or leave out these examples, or allow more" in capsys.readouterr().err
    saved = open_checkpoint(run).step
    assert 0 < saved < 20
    allowed = ("data.n_bad_allowed=4000", f"n_steps={20}")
    assert main(command("finetune", *options, settings=(*settings, *allowed))) == 0
    assert open_checkpoint(run).step == 20
    assert list(figures(run)["loss"]) == list(range(1, 21))


def test_a_damaged_held_out_picture_is_not_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learnt = own_pictures(tmp_path / "rows", 4, broken=set())
    held_out = own_pictures(tmp_path / "looked_at", 3, broken={0, 2}).rename(
        tmp_path / "looked_at" / "other.jsonl"
    )
    settings = (*SMALL[:-1], "n_steps=1", "validate_every=1", "data.media.max_frames=4")
    run = tmp_path / "run"
    options = ("--init", TINY, "--data", str(learnt), "--held-out", str(held_out))
    assert main(command("finetune", *options, "--run", str(run), settings=settings)) == 0
    assert figures(run)["other/loss"][1] > 0
    assert "other[0] is not looked at" in caplog.text
    assert "other[1]" not in caplog.text


def test_own_data_elsewhere_has_to_be_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = tmp_path / "rows", tmp_path / "picture.png"
    folder.mkdir()
    Image.new("RGB", (130, 130), (200, 0, 0)).save(picture)
    row = {"image": str(picture), "question": "a", "answer": "b"}
    (folder / "own.jsonl").write_text(json.dumps(row) + "\n")
    options = ("--init", TINY, "--data", str(folder / "own.jsonl"), "--dry-run")
    settings = (*SMALL[:-1], "n_steps=1", "data.media.max_frames=4")
    assert main(command("finetune", *options, settings=settings)) == 1
    assert "allow other places with --allow-absolute" in capsys.readouterr().err
    assert main(command("finetune", *options, "--allow-absolute", settings=settings)) == 0


def test_other_settings_are_refused_before_weights_are_made(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(running, "prepared_model", unwanted)
    changed = (*SMALL, "optim.llm.lr=0.5", "data.seed=1", "log_every=3")
    assert main(command("pretrain-debug", "--run", str(run), settings=changed)) == 1
    said = capsys.readouterr().err
    assert "the run cannot go on with other settings: optim.llm.lr is 0.5, was 0.002;" in said
    assert "data.seed is 1, was 95818" in said
    assert "log_every" not in said


def test_a_saved_state_is_published_and_evaluated(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    told = "import sys; print('asked', *sys.argv[1:])"
    config = SavingConfig(
        publish_to=str(store),
        publish_name="small",
        evaluation=(sys.executable, "-c", told, "{checkpoint}", "--step={step}"),
    )
    with Following(config, tmp_path) as following:
        following.saved(run / "step4")
    (published,) = FolderStore(store).ids()
    said = (tmp_path / EVALUATIONS / f"{published}.txt").read_text()
    assert said == f"asked {published} --step=4\n"


def test_dry_run_tells_shares_tokens_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("pretrain-debug", "--dry-run")) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line}
    assert lines["drawn_captions"][1:3] == ["200,000", "60.000%"]
    assert lines["drawn_points_one"][2] == "10.000%"
    assert lines["llm"][1:] == ["2,558,784", "0"]
    assert lines["vit"][1:] == ["1,908,096", "0"]
    assert "pretrain-debug: 4 steps of 2 packs, 1 rank" in said
    assert "tokens (" in said
    assert float(lines["together"][1]) > 0.07  # 16 bytes for each of 5 M parameters


def test_a_tied_head_stays_the_embedding(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    native = Path(__file__).parents[2] / "golden" / "native" / "qwen3_tied-unsharded"
    whole = ("model.trained.ft_embedding=all",)
    for assignments, is_trained in (((), False), (whole, True)):
        config = configured("finetune", assignments, init=native, data=(tmp_path / "own.jsonl",))
        plan = Plan(config)
        model, _ = running.prepared_model(plan, ALONE, torch.device("cpu"))
        embedding = model.model.transformer.wte.embedding
        assert model.lm_head.weight is embedding
        assert embedding.requires_grad is is_trained
        counted = {count.group: count.n_frozen for count in plan.counts}
        assert counted["llm"] == (0 if is_trained else embedding.numel())


def test_adapters_are_trained_and_read_as_a_whole_checkpoint(tmp_path: Path) -> None:
    own, run = tmp_path / "own.jsonl", tmp_path / "run"
    own.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    settings = (*SMALL[:-1], "n_steps=1", "model.lora.rank=2", "data.media.max_frames=4")
    options = ("--init", TINY, "--data", str(own), "--run", str(run))
    assert main(command("finetune-lora", *options, settings=settings)) == 0
    opened, start = open_checkpoint(run), open_checkpoint(Path(TINY))
    assert opened.differences() == []
    assert not opened.is_tied
    name = "model.transformer.blocks.0.self_attn.att_proj.weight"
    moved = (opened.weights.read(name) - start.weights.read(name).float()).abs().max().item()
    assert 0 < moved < 0.01
    assert torch.equal(opened.weights.read("lm_head.weight"), start.weights.read("lm_head.weight"))


def test_a_run_with_adapters_keeps_only_what_it_trains_and_says_where_the_rest_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, run, start = tmp_path / "own.jsonl", tmp_path / "run", tmp_path / "start"
    own.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    shutil.copytree(TINY, start)
    settings = (*SMALL[:-1], "n_steps=2", "save_every=1", "model.lora.rank=2")

    def train(begin: Path, *more: str) -> int:
        options = ("--init", str(begin), "--data", str(own), "--run", str(run))
        given = (*settings, "data.media.max_frames=4", *more)
        return main(command("finetune-lora", *options, settings=given))

    assert train(start) == 0
    whole = open_checkpoint(run)
    read = {name: whole.weights.read(name) for name in whole.weights.shapes()}
    state = sum(file.stat().st_size for file in (run / "step2").rglob("*"))
    assert state < 0.3 * (start / "model.safetensors").stat().st_size
    shutil.rmtree(run / "step2")
    moved = start.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the rest is in .*start', which is not there"):
        open_checkpoint(run)
    assert train(moved) == 0  # from elsewhere: the same weights are enough
    again = open_checkpoint(run)
    assert read_origin(again.folder) == Origin.of(moved)
    assert all(torch.equal(again.weights.read(name), read[name]) for name in read)
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"moved' holds other weights"):
        open_checkpoint(run)
    assert train(moved) == 1
    assert "put those that the run began with there" in capsys.readouterr().err


def test_a_mixture_goes_on_without_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOLMO_DATA_DIR", str(tmp_path))
    missing = ("data.mixture.nlp.parts.0.dataset=pixmo_cap", "data.leave_out_missing=true")
    plan = Plan(configured("pretrain-debug", missing))
    assert set(plan.sizes) == {
        "drawn_captions",
        "drawn_points",
        "drawn_points_one",
        "drawn_points_few",
    }
    assert "left out, for their files are not there: pixmo_cap" in caplog.text


def test_print_config_is_json_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft", "--print-config", "--init", TINY, "--set", "seed=3"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["recipe"], document["seed"], document["n_steps"]) == ("sft", 3, 30_000)
    assert document["data"]["budgets"] == {"n_tokens": 16_384, "n_crops": 128}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pretran"], "there is no recipe pretran; did you mean pretrain or pretrain-debug? there"),
        (["debug_pretrain"], "no recipe debug_pretrain; did you mean pretrain-debug? there are"),
        (["LoRA finetune"], "did you mean finetune-lora? there are"),
        (["zzz"], "there is no recipe zzz; there are pretrain, sft, long-context, finetune"),
        (["pretrain-debug", "--time-limit", "0"], "saving.time_limit_s is 0; give seconds above 0"),
        (["sft"], "sft starts from a checkpoint; name its folder with --init"),
        (["sft", "--init", "nowhere"], "there is no folder 'nowhere'; expected a checkpoint"),
        (["finetune", "--init", TINY], "finetune trains on your own data; name its files"),
        (["finetune", "--init", TINY, "--data", "no.jsonl"], "there is no file or folder"),
        (["pretrain-debug", "--set", "seed=x"], "seed cannot be 'x'; allowed is a whole number"),
        (
            ["pretrain-debug", "--set", "data.mixture.nlp.parts.0.dataset=drawn_txt"],
            "there is no dataset drawn_txt; near are drawn_text",
        ),
        (
            ["pretrain-debug", "--set", "model.freeze=*.nothing"],
            "no parameter is called '*.nothing'",
        ),
        (
            ["pretrain-debug", "--set", "data.budgets.n_crops=1"],
            "data.budgets.n_crops is 1; one image may take 2",
        ),
        (
            ["pretrain-debug", "--set", "parallel.context_degree=2"],
            "1 processes cannot be divided: context_degree is 2",
        ),
        (["pretrain-debug", "--set", "data.packs_per_step=0"], "data.packs_per_step is 0"),
        (
            ["pretrain-debug", "--set", "data.packs_per_step=5"],
            "data.packs_per_step is 5; a rank that reads data.packs_per_batch=2 at a time: give a "
            "multiple of 2",
        ),
        (
            [
                "pretrain-debug",
                *("--set", "data.media.max_images=20"),
                *("--set", "data.media.max_multi_image_crops=3"),
            ],
            "data.budgets.n_crops is 24; 20 images may take 80",
        ),
        (["pretrain", "--init", TINY], "pixmo_cap_with_transcripts"),
    ],
)
def test_wrong_settings_are_said_before_weights_are_loaded(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLMO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(running, "prepared_model", None)
    assert main(["train", *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_whatever_a_publication_fails_of_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr("molmo_training.launch.following.publish", fails)
    with Following(SavingConfig(publish_to=str(tmp_path / "store")), tmp_path) as following:
        following.saved(tmp_path / "step4")
    assert "step4 is not published" in caplog.text
    assert "no memory is left" in caplog.text


def test_a_store_that_is_away_ends_nothing(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "staging").write_text("in the way")
    with Following(SavingConfig(publish_to=str(store)), tmp_path) as following:
        following.saved(run / "step4")
    assert "step4 is not published" in caplog.text
    assert "Traceback" not in caplog.text
    assert FolderStore(store).current() is None
