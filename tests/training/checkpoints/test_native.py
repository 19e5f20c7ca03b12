"""Ai2's native checkpoints: read exactly, computed exactly, refused clearly."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from molmo_core.errors import CheckpointError
from molmo_core.images import prepare_image
from molmo_hf.modeling_molmo2 import attention_mask
from molmo_training.checkpoints.names import to_hf, to_native
from molmo_training.checkpoints.native_config import read_native_config, write_native_config
from molmo_training.checkpoints.native_weights import ShardedWeights, UnshardedWeights
from molmo_training.checkpoints.opened import Kind, load_model, open_checkpoint

FOLDERS = {"olmo3": "olmo3", "qwen3_tied": "qwen3_tied-unsharded"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_losses_of_the_reference_are_reproduced(native: Path, name: str) -> None:
    opened = open_checkpoint(native / FOLDERS[name])
    model = load_model(opened)
    cases = json.loads((native / "cases.json").read_text())
    reference = load_file(native / "reference.safetensors")
    names = [case for case in cases if case.startswith(name)]
    assert len(names) == 3
    for case in names:
        values = {
            key.removeprefix(f"{case}."): value
            for key, value in reference.items()
            if key.startswith(f"{case}.")
        }
        picture = np.array(Image.open(native / cases[case]["image"]).convert("RGB"))
        prepared = prepare_image(picture, opened.images)
        assert np.array_equal(prepared.pooling, values["token_pooling"].numpy())
        losses = _losses(model, values, torch.from_numpy(prepared.crops))
        assert losses == pytest.approx(values["token_ce"].numpy(), rel=1e-4, abs=1e-4)
        weights = values["loss_masks"][values["loss_masks"] > 0]
        total = float((torch.from_numpy(losses) * weights).sum())
        assert total == pytest.approx(cases[case]["weighted_loss_sum"], rel=1e-5)


@torch.inference_mode()
def _losses(model: torch.nn.Module, values: dict[str, Tensor], crops: Tensor) -> np.ndarray:
    """Cross-entropy (n,) at the positions with weight, in order."""
    ids = values["input_tokens"][None]
    features = model.model.vision_backbone.pool(
        model.model.vision_backbone.encode(crops), values["token_pooling"]
    )
    visual = torch.isin(ids, torch.tensor(model.config.visual_token_ids))
    subsegments = values.get("subsegment_ids")
    mask = attention_mask(
        torch.ones_like(ids, dtype=torch.bool),
        visual,
        None if subsegments is None else subsegments[None],
    )
    x = model.model.embed(ids, features)
    hidden = model.model.transformer(x, values["position_ids"][None], mask)[0]
    learnt = values["loss_masks"] > 0
    logits = model.lm_head(hidden[learnt])
    targets = values["target_tokens"][learnt]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()


def test_the_forms_are_told_apart_and_the_last_step_is_taken(native: Path, tmp_path: Path) -> None:
    assert open_checkpoint(native / "olmo3").kind is Kind.NATIVE_SHARDED
    assert open_checkpoint(native / "qwen3_tied-unsharded").kind is Kind.NATIVE_UNSHARDED
    for step in ("step9", "step10-unsharded"):
        shutil.copytree(native / "qwen3_tied-unsharded", tmp_path / step)
    (tmp_path / "step11").mkdir()  # begun and never written
    assert open_checkpoint(tmp_path).folder.name == "step10-unsharded"
    shutil.copytree(native / "olmo3", tmp_path / "step10")
    assert open_checkpoint(tmp_path).folder.name == "step10"


def test_names_are_mapped_both_ways(native: Path) -> None:
    native_names = list(ShardedWeights(native / "olmo3" / "model_and_optim").shapes())
    assert [to_native(to_hf(name)) for name in native_names] == native_names
    assert to_hf("transformer.blocks.3.q_norm.weight") == (
        "model.transformer.blocks.3.self_attn.q_norm.weight"
    )
    assert to_hf("transformer.blocks.11.ff_norm.weight") == (
        "model.transformer.blocks.11.ff_norm.weight"
    )
    assert to_hf("transformer.blocks.0.ff_out.weight") == (
        "model.transformer.blocks.0.mlp.ff_out.weight"
    )
    assert to_hf("transformer.ff_out.weight") == "lm_head.weight"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_writes_today_is_read(tmp_path: Path) -> None:
    tensors = {f"model.{name}": torch.randn(5, 3) for name in ("a", "b")}
    dcp.save({**tensors, "optim.a": torch.zeros(5)}, checkpoint_id=tmp_path, no_dist=True)
    weights = ShardedWeights(tmp_path)
    assert weights.shapes() == {"a": (5, 3), "b": (5, 3)}
    assert torch.equal(weights.read("b"), tensors["model.b"])


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "torch.load", "torch.storage.x"])
def test_a_table_of_contents_that_names_code_is_refused(tmp_path: Path, target: str) -> None:
    module, _, name = target.rpartition(".")
    code = f"c{module}\n{name}\n(S'touch {tmp_path}/pwned'\ntR.".encode()
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match=f"it names {target}, which no checkpoint needs"):
        ShardedWeights(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_model_file_that_carries_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"a": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be read"):
        UnshardedWeights(tmp_path / "model.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        UnshardedWeights(tmp_path / "model.pt")
    old = {"a": torch.ones(2)}
    torch.save(old, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"model\.pt is of the form that torch wrote"):
        UnshardedWeights(tmp_path / "model.pt")


def test_damage_is_named(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native / "olmo3" / "model_and_optim", tmp_path / "m")
    whole = ShardedWeights(tmp_path / "m")
    rank = tmp_path / "m" / "__0_1.distcp"
    rank.write_bytes(rank.read_bytes()[:1000])
    whole.read("transformer.ln_f.weight")
    with pytest.raises(CheckpointError, match=r"a piece of .* in __0_1\.distcp cannot be read"):
        [whole.read(name) for name in whole.shapes()]
    (tmp_path / "m" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(CheckpointError, match="lacks a field"):
        ShardedWeights(tmp_path / "m")


def test_a_config_is_written_as_it_was_read(native: Path, tmp_path: Path) -> None:
    for folder in FOLDERS.values():
        first = read_native_config(native / folder / "config.yaml")
        write_native_config(tmp_path / "config.yaml", first)
        again = read_native_config(tmp_path / "config.yaml")
        assert again.model.to_dict() == first.model.to_dict()
        assert (again.images, again.videos, again.is_tied) == (
            first.images,
            first.videos,
            first.is_tied,
        )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_name", "molmo_point", "MolmoPoint checkpoint"),
        ("model_name", "molmo", "model_name is 'molmo'"),
        ("vision_backbone", None, "no vision_backbone"),
        ("bi_directional_attn", "within_image", "bi_directional_attn is 'within_image'"),
        ("vision_backbone.vit.image_model_type", "openai", "image_model_type is 'openai'"),
        ("vision_backbone.image_pooling_2d", "stack", "image_pooling_2d is 'stack'"),
        ("llm.block_type", "moe", "block_type is 'moe'"),
        ("llm.include_bias", True, "include_bias is True"),
        ("mm_preprocessor.image.crop_mode", "resize", "crop_mode is 'resize'"),
        ("mm_preprocessor.video.max_fps", [1, 2], r"max_fps is \[1, 2\]"),
        ("llm.n_layers", "many", "lacks or spoils a field"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(
    native: Path, tmp_path: Path, path: str, value: object, message: str
) -> None:
    content = yaml.safe_load((native / "olmo3" / "config.yaml").read_text())
    *parents, last = path.split(".")
    section = content["model"]
    for parent in parents:
        section = section[parent]
    section[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match=message):
        read_native_config(tmp_path / "config.yaml")


def test_legacy_forms_of_the_config_are_read(native: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((native / "olmo3" / "config.yaml").read_text())
    preprocessor = content["model"]["mm_preprocessor"]
    preprocessor |= preprocessor.pop("video")  # before videos had a section of their own
    preprocessor.pop("per_frame_special_token")
    content["model"]["llm"] |= {"mm_rope": False, "mlp_hidden_size": None, "mlp_ratio": 6}
    content["model"]["llm"] |= {"sliding_attention_rope_scaling": True, "head_dim": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    config = read_native_config(tmp_path / "config.yaml", max_model_len=77)
    assert (config.videos.max_frames, config.videos.sample_mode) == (16, "fps")
    text = config.model.text_config
    assert (text.intermediate_size, text.head_dim) == (384, 32)
    assert text.rope_scaling_layers == [0, 2]
    assert text.max_position_embeddings == 77
    assert config.notes == ()
