"""The launch line follows the checkpoint."""

from __future__ import annotations

import json
import sys

import pytest

from molmo_core.errors import CheckpointError
from molmo_server.engine import launch
from molmo_server.engine.drafts.proposer import CoordProposer
from molmo_server.engine.launch import EngineSettings, engine_command


def write_folder(folder, *, video=None, nested=False, max_len=8192):
    folder.mkdir(exist_ok=True)
    config = {"text_config": {"max_position_embeddings": max_len}}
    (folder / "config.json").write_text(json.dumps(config))
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"video_processor": video}))
    else:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video or {}))
    return folder


def flags(argv):
    return {flag: argv[k + 1] for k, flag in enumerate(argv[:-1]) if flag.startswith("--")}


def command(folder, **fields):
    settings = EngineSettings(checkpoint=folder, socket=folder / "e.sock", **fields)
    return engine_command(settings)


def test_sizes_come_from_the_checkpoint(tmp_path):
    argv, environment = command(write_folder(tmp_path / "m"), max_num_seqs=4, n_threads=2)
    found = flags(argv)
    assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    assert found["--max-model-len"] == "8192"
    assert found["--max-num-batched-tokens"] == "8196", "a whole prompt beside running answers"
    assert json.loads(found["--limit-mm-per-prompt"]) == {"image": 4, "video": 1}
    assert found["--uds"] == str(tmp_path / "m" / "e.sock")
    assert "--port" not in argv
    assert environment["VLLM_PLUGINS"] == "molmo,molmo_control"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_one_thread_needs_no_worker_process(tmp_path):
    folder = write_folder(tmp_path / "m")
    switch = "VLLM_ENABLE_V1_MULTIPROCESSING"
    assert command(folder, n_threads=1)[1][switch] == "0"
    assert switch not in command(folder, n_threads=2)[1]
    assert switch not in command(folder)[1]


def test_a_shorter_context_shrinks_the_step(tmp_path):
    argv, _ = command(write_folder(tmp_path / "m"), max_model_len=2048, max_num_seqs=8)
    assert flags(argv)["--max-model-len"] == "2048"
    assert flags(argv)["--max-num-batched-tokens"] == "2056"


def test_a_cpu_computes_in_what_the_checkpoint_says(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m")
    assert flags(command(folder)[0])["--dtype"] == "auto"
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    assert flags(command(folder)[0])["--dtype"] == "float32"
    assert flags(command(folder, dtype="bfloat16")[0])["--dtype"] == "bfloat16"
    monkeypatch.setattr(launch, "distributions", lambda name: iter(()))
    assert flags(command(folder)[0])["--dtype"] == "auto", "a GPU build"


def test_drafts_have_room_in_a_step(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m")
    assert "--speculative-config" not in flags(command(folder)[0])
    drafting = flags(command(folder, drafts="on", max_num_seqs=4)[0])
    config = json.loads(drafting["--speculative-config"])
    assert config["method"] == "custom_class"
    assert config["model"] == f"{CoordProposer.__module__}.{CoordProposer.__name__}"
    assert drafting["--max-num-batched-tokens"] == str(8192 + 4 * 9)
    assert flags(command(folder, drafts="auto", max_num_seqs=4)[0]) == drafting
    monkeypatch.setattr(launch, "distributions", lambda name: iter(()))
    assert "--speculative-config" not in flags(command(folder, drafts="auto")[0]), "a GPU build"


@pytest.mark.parametrize("nested", [False, True])
def test_frame_sampling_is_the_checkpoints_in_both_folder_layouts(tmp_path, nested):
    video = {"num_frames": 64, "max_fps": 4, "frame_sample_mode": "fps", "size": {"height": 98}}
    argv, _ = command(write_folder(tmp_path / "m", video=video, nested=nested))
    media = json.loads(flags(argv)["--media-io-kwargs"])
    assert media["video"] == {
        "video_backend": "molmo2",
        "num_frames": 64,
        "most_frames": 384,
        "frame_sample_mode": "fps",
        "max_fps": 4,
        "sampling_fps": 2.0,
        "crop_px": 98,
        "frame_cache_bytes": 512 * 1024**2,
    }
    assert media["image"] == {"image_mode": None}


def test_files_are_read_in_the_folder_that_is_named_only(tmp_path):
    folder = write_folder(tmp_path / "m")
    assert "--allowed-local-media-path" not in command(folder)[0]
    found = flags(command(folder, media_folder=tmp_path)[0])
    assert found["--allowed-local-media-path"] == str(tmp_path)


@pytest.mark.parametrize("content", [None, "{", '{"text'])
def test_a_folder_without_readable_configuration_is_refused(tmp_path, content):
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json of checkpoint 'm' cannot be read"):
        command(folder)


def test_traces_go_where_the_gateways_go(tmp_path):
    folder = write_folder(tmp_path / "m")
    argv, environment = command(folder, otlp_endpoint="http://127.0.0.1:4318/")
    assert flags(argv)["--otlp-traces-endpoint"] == "http://127.0.0.1:4318/v1/traces"
    assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"

    argv, environment = command(folder)
    assert "--otlp-traces-endpoint" not in argv
    assert [name for name in environment if name.startswith("OTEL")] == []
