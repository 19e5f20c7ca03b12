"""From one form to another: the same numbers, the same answers, nothing half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from molmo_client.__main__ import main as molmo
from molmo_core.errors import CheckpointError
from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.weight_files import INDEX_FILE, LoadedWeights, write_weights
from molmo_training.checkpoints.convert import NATIVE_COPY, to_hugging_face, to_native_folder
from molmo_training.checkpoints.opened import OpenedCheckpoint, open_checkpoint
from molmo_training.checkpoints.safetensors_weights import SafetensorsWeights
from molmo_training.checkpoints.verify import compare

FOLDERS = ("olmo3", "qwen3_tied-unsharded")


def tensors_of(opened: OpenedCheckpoint) -> dict[str, Tensor]:
    return {name: opened.weights.read(name) for name in opened.weights.shapes()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_native_to_hugging_face_and_back_is_bit_equal(
    native: Path, tmp_path: Path, folder: str
) -> None:
    source = open_checkpoint(native / folder)
    hf = open_checkpoint(to_hugging_face(source, tmp_path / "hf"))
    assert_equal(tensors_of(source), tensors_of(hf))
    assert hf.config.text_config.to_dict() == source.config.text_config.to_dict() | {
        "tie_word_embeddings": False
    }
    assert (hf.images, hf.videos) == (source.images, source.videos)
    back = to_native_folder(hf, tmp_path / "back")
    assert (back / "config.yaml").read_text() == (native / folder / "config.yaml").read_text()
    assert_equal(
        torch.load(back / "model.pt", weights_only=True),
        {name: source.weights.read(hf_name) for name, hf_name in _native_names(source).items()},
    )
    (hf.folder / NATIVE_COPY).unlink()  # without it the configuration is made from the files
    again = open_checkpoint(to_native_folder(hf, tmp_path / "again"))
    assert again.is_tied == source.is_tied
    assert again.config.to_dict() == source.config.to_dict()


def _native_names(opened: OpenedCheckpoint) -> dict[str, str]:
    from molmo_training.checkpoints.names import HEAD, to_native

    names = [n for n in opened.weights.shapes() if not (opened.is_tied and n == HEAD)]
    return {to_native(name): name for name in names}


def test_an_export_answers_as_its_source_and_a_changed_one_does_not(
    native: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(native / "olmo3")
    out = to_hugging_face(source, tmp_path / "hf")
    assert {d.max_logprob for d in compare(source, open_checkpoint(out))} == {0.0}
    mapped = load_file(out / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in mapped.items()}
    del mapped  # its file is written over below
    weights["model.vision_backbone.image_projector.w2.weight"] *= 1.01
    write_weights(LoadedWeights(weights), out, dtype=torch.float32)
    by_prompt = {d.prompt: d for d in compare(source, open_checkpoint(out))}
    assert by_prompt["text"].max_logprob == 0
    assert by_prompt["small picture"].max_logprob > 1e-5
    assert by_prompt["clip"].max_logprob > 1e-5


def test_files_are_cut_at_the_size_and_the_index_finds_every_tensor(
    native: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(native / "olmo3")
    out = to_hugging_face(source, tmp_path / "hf", dtype=torch.bfloat16, shard_bytes=300_000)
    parts = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(parts) > 4
    assert all(part.stat().st_size < 300_000 + 20_000 for part in parts)
    index = json.loads((out / INDEX_FILE).read_text())
    read = SafetensorsWeights(out)
    assert index["weight_map"].keys() == read.shapes().keys() == source.weights.shapes().keys()
    assert index["metadata"]["total_size"] == 2 * sum(map(math.prod, read.shapes().values()))
    for name in read.shapes():
        assert torch.equal(read.read(name), source.weights.read(name).bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_overwritten_or_left_half_done(native: Path, tmp_path: Path) -> None:
    source = open_checkpoint(native / "olmo3")
    with pytest.raises(CheckpointError, match="give its folder with --tokenizer"):
        to_hugging_face(source, tmp_path / "out", tokenizer=str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="never overwritten"):
        to_hugging_face(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_and_foreign_tensors_are_named(native: Path, tmp_path: Path) -> None:
    content = torch.load(native / "qwen3_tied-unsharded" / "model.pt", weights_only=True)
    del content["transformer.ln_f.weight"]
    content["transformer.blocks.9.k_norm.weight"] = torch.zeros(32)
    content["transformer.blocks.0.q_norm.weight"] = torch.zeros(31)
    torch.save(content, tmp_path / "model.pt")
    config = (native / "qwen3_tied-unsharded" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config)
    opened = open_checkpoint(tmp_path)
    assert opened.differences() == [
        "missing: model.transformer.ln_f.weight (128,)",
        "not expected: model.transformer.blocks.9.self_attn.k_norm.weight",
        "shape of model.transformer.blocks.0.self_attn.q_norm.weight: (31,), expected (32,)",
    ]
    with pytest.raises(CheckpointError, match=r"do not fit its configuration: missing: model\.t"):
        to_hugging_face(opened, tmp_path / "out")


RELEASED = {
    "Molmo2-4B": (2560, 36, 32, 8, 9728, 151936, "qwen3", False),
    "Molmo2-8B": (4096, 36, 32, 8, 12288, 151936, "qwen3", False),
    "Molmo2-O-7B": (4096, 32, 32, 32, 11008, 100278, "olmo", True),
}


@pytest.mark.parametrize(("name", "n_billions"), [*zip(RELEASED, (4.9, 8.7, 7.8), strict=True)])
def test_released_geometries_are_opened_with_their_real_shapes(
    tmp_path: Path, name: str, n_billions: float
) -> None:
    folder = sparse_checkpoint(tmp_path, name)
    opened = open_checkpoint(folder)
    assert opened.differences() == []
    n = sum(map(math.prod, opened.weights.shapes().values()))
    assert n / 1e9 == pytest.approx(n_billions, abs=0.1)
    weight = "model.vision_backbone.image_vit.transformer.resblocks.24.attention.wq.weight"
    assert opened.weights.shapes()[weight] == (1152, 1152)
    assert opened.weights.read("model.transformer.ln_f.weight").count_nonzero() == 0


def sparse_checkpoint(folder: Path, name: str) -> Path:
    """A released folder whose weight files have their real sizes and only holes inside."""
    width, layers, heads, kv, wide, rows, norm, after = RELEASED[name]
    source = Path(__file__).parents[3] / "clients/molmo_hf/checkpoints/molmo2-tiny"
    text = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": wide,
        "vocab_size": rows,
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": norm,
        "norm_after": after,
    }
    adapter = {"intermediate_size": wide, "text_hidden_size": width}
    config = Molmo2Config(text_config=text, adapter_config=adapter)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration

    with torch.device("meta"):
        state = Molmo2ForConditionalGeneration(config).state_dict()
    header: dict[str, object] = {}
    end = 0
    for key, tensor in state.items():
        begin, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text_header = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text_header).to_bytes(8, "little") + text_header)
        file.truncate(8 + len(text_header) + end)
    return folder


def test_the_command_line(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(native / "olmo3"), str(tmp_path / "out")
    assert molmo(["checkpoint", "import", source, out, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert "holds olmo3 in the Hugging Face layout" in said.out
    assert "frame tokens around the whole video" in said.err
    assert molmo(["checkpoint", "show", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["parameters"], facts["differences"]) == ("hf", 963584, [])
    assert molmo(["checkpoint", "verify", source, out]) == 1  # bfloat16 is not float32
    said = capsys.readouterr()
    assert "differ by more than 0.0001 on: text, small picture" in said.err
    assert molmo(["checkpoint", "verify", source, out, "--tolerance", "0.2"]) == 0
    assert molmo(["checkpoint", "import", source, out]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert molmo(["checkpoint", "export", out, out + "2", "--shard-size", "none"]) == 1
    assert "--shard-size is 'none'" in capsys.readouterr().err
    native_out = str(tmp_path / "native")
    assert molmo(["checkpoint", "export", out, native_out, "--layout", "native"]) == 0
    assert sorted(p.name for p in Path(native_out).iterdir()) == ["config.yaml", "model.pt"]


def test_numbers_that_need_no_cast_are_copied_and_others_are_cast(
    native: Path, tmp_path: Path
) -> None:
    """From a file that the system copies from, and through memory: the same bytes."""
    source = open_checkpoint(
        to_hugging_face(open_checkpoint(native / "olmo3"), tmp_path / "hf", dtype=torch.bfloat16)
    )
    loaded = LoadedWeights(tensors_of(source))
    for name, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        copied, written = tmp_path / f"{name}-copied", tmp_path / f"{name}-written"
        copied.mkdir()
        written.mkdir()
        write_weights(source.weights, copied, dtype=dtype, shard_bytes=100_000)
        write_weights(loaded, written, dtype=dtype, shard_bytes=100_000)
        files = sorted(path.name for path in written.iterdir())
        assert sorted(path.name for path in copied.iterdir()) == files
        assert len(files) > 2
        for file in files:
            assert (copied / file).read_bytes() == (written / file).read_bytes(), file


def test_a_file_that_shrinks_while_it_is_copied(native: Path, tmp_path: Path) -> None:
    source = open_checkpoint(to_hugging_face(open_checkpoint(native / "olmo3"), tmp_path / "hf"))
    (weights,) = source.folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="is cut short; copy it again"):
        to_hugging_face(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
