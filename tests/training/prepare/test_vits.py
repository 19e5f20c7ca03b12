"""Vision towers: every layer computes what transformers computes, on the same pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from molmo_core.errors import CheckpointError
from molmo_core.pixels import normalised, to_patches
from molmo_hf.modeling_molmo2_vision import Molmo2VisionTransformer
from molmo_training.prepare import sources
from molmo_training.prepare.parts import VitPart, open_part, write_part
from molmo_training.prepare.sources import PICKLED
from molmo_training.prepare.vits import FAMILIES, PREFIX, resized_positions

MEANS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "dinov2": "dinov2"}


def pictures(side_px: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, side_px, side_px, 3), dtype=np.uint8)


def tower_outputs(part: VitPart, bytes_: np.ndarray) -> list[torch.Tensor]:
    """All layers, pixels prepared as server and training prepare them."""
    n_layers = part.config.num_hidden_layers
    tower = Molmo2VisionTransformer(part.config, list(range(n_layers))).eval()
    names = part.weights.shapes()
    tower.load_state_dict({n.removeprefix(PREFIX): part.weights.read(n) for n in names})
    patches = normalised(to_patches(bytes_, part.config.image_patch_size))
    with torch.inference_mode():
        return tower(torch.from_numpy(patches))


def their_pixels(bytes_: np.ndarray, mean, std) -> torch.Tensor:
    unit = torch.from_numpy(bytes_).permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "fields", "input_px"),
    [
        ("siglip", {}, None),
        ("siglip", {"image_size": 31}, None),  # as 384 px with patches of 14: the rest is cut off
        ("siglip_both", {}, None),
        ("clip", {}, None),
        ("clip_both", {}, 42),
        ("clip", {"hidden_act": "gelu"}, 21),
        ("dinov2", {}, None),
        ("dinov2", {}, 28),
        ("dinov2", {}, 63),
    ],
)
def test_every_layer_is_that_of_transformers(save, kind, fields, input_px):
    folder, model = save(kind, **fields)
    part = open_part(str(folder), input_px=input_px)
    assert isinstance(part, VitPart)
    side_px = part.config.image_default_input_size[0]
    assert side_px == (input_px or {"dinov2": 42}.get(kind, 28))
    bytes_ = pictures(side_px)
    pixels = their_pixels(bytes_, *FAMILIES[MEANS[kind.removesuffix("_both")]].pixels)
    model = getattr(model, "vision_model", model)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": input_px is not None}
    with torch.inference_mode():
        theirs = model(pixels, output_hidden_states=True, **options).hidden_states[1:]
    n_front = int(part.config.class_token)
    ours = tower_outputs(part, bytes_)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b[:, n_front:]).abs().max() <= 1e-5 * b.abs().max()


def test_the_folders_own_mean_and_deviation_count(save):
    folder, model = save("clip")
    mean, std = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    settings = {"image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    bytes_ = pictures(28)
    with torch.inference_mode():
        theirs = model(their_pixels(bytes_, mean, std), output_hidden_states=True).hidden_states
    ours = tower_outputs(open_part(str(folder)), bytes_)
    assert (ours[-1] - theirs[-1][:, 1:]).abs().max() <= 1e-5 * theirs[-1].abs().max()


def test_the_kernel_is_a_matrix_in_the_order_row_column_channel(save):
    """SigLIP's pixels are Molmo2's: the numbers are those of the kernel, not rounded anew."""
    folder, model = save("siglip")
    part = open_part(str(folder))
    kernel = model.embeddings.patch_embedding
    matrix = part.weights.read(f"{PREFIX}patch_embedding.weight").view(-1, 7, 7, 3)
    assert torch.equal(matrix[5, 2, 4], kernel.weight[5, :, 2, 4])
    assert torch.equal(matrix, kernel.weight.permute(0, 2, 3, 1))
    assert torch.equal(part.weights.read(f"{PREFIX}patch_embedding.bias"), kernel.bias)


def test_positions_are_interpolated_as_torch_does_and_kept_where_the_grid_fits():
    table = torch.randn(1, 1 + 37 * 37, 6, generator=torch.Generator().manual_seed(0))
    grid = table[0, 1:].view(37, 37, 6).permute(2, 0, 1)[None]
    wanted = F.interpolate(grid, size=(24, 24), mode="bicubic", align_corners=False)
    found = resized_positions(table, n_front=1, size=(24, 24))
    assert torch.equal(found, wanted[0].permute(1, 2, 0).reshape(576, 6))
    assert torch.equal(resized_positions(table, n_front=1, size=(37, 37)), table[0, 1:])


def test_the_presets_of_the_reference(save):
    """OpenAI's keeps all layers but the last, DINOv2 and MetaCLIP L see 336 px."""
    folder, _ = save("clip", num_hidden_layers=24, hidden_size=16, num_attention_heads=2)
    part = open_part("openai", source=str(folder))
    assert part.config.num_hidden_layers == 23
    assert not any(".23." in name for name in part.weights.shapes())
    folder, _ = save("dinov2", image_size=518, patch_size=14)
    part = open_part("dinov2_large_336", source=str(folder))
    assert part.config.image_default_input_size == [336, 336]
    assert part.weights.shapes()[f"{PREFIX}positional_embedding"] == (576, 48)


def test_a_pickled_file_of_tensors_is_read_and_nothing_else_of_it(save):
    folder, model = save("clip")
    weights = open_part(str(folder)).weights
    expected = {name: weights.read(name) for name in weights.shapes()}
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / PICKLED)
    found = open_part(str(folder))
    assert all(torch.equal(found.weights.read(n), tensor) for n, tensor in expected.items())
    torch.save({"model": model}, folder / PICKLED)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* cannot be read"):
        open_part(str(folder))


def test_a_prepared_tower_is_the_same_tower(save, tmp_path):
    part = open_part(str(save("dinov2")[0]), input_px=28)
    folder = write_part(part, tmp_path / "part", dtype=torch.float32)
    again = open_part(str(folder), input_px=28)
    assert again.config.to_dict() == part.config.to_dict()
    shapes = part.weights.shapes()
    assert all(torch.equal(again.weights.read(n), part.weights.read(n)) for n in shapes)
    with pytest.raises(CheckpointError, match="prepared for crops of 28 px, asked for are 42"):
        open_part(str(folder), input_px=42)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dinov2", {"use_swiglu_ffn": True}, "gated MLP"),
        ("clip", {"num_hidden_layers": 6}, "lack encoder.layers.4"),
        ("clip", {"num_hidden_layers": 3}, r"hold encoder\.layers\.3"),
        ("clip", {"patch_size": 0}, "makes no model"),
        ("siglip", {"model_type": "siglip2_vision_model"}, "model_type 'siglip2_vision_model'"),
        ("siglip", {"intermediate_size": 64}, r"feed_forward\.w1\.weight: \(80, 48\), expected"),
    ],
)
def test_what_does_not_fit_is_refused(save, kind, change, message):
    folder, _ = save(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        open_part(str(folder))


def test_other_mistakes_are_named(save):
    folder, _ = save("clip")
    with pytest.raises(CheckpointError, match="crops of 30 px do not divide into patches of 7"):
        open_part(str(folder), input_px=30)
    with pytest.raises(CheckpointError, match="for 'qwen3_8b' a llm is wanted"):
        open_part("qwen3_8b", source=str(folder))
    with pytest.raises(CheckpointError, match="23 layers are asked for; the tower has 4"):
        open_part("openai", source=str(folder))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [1]}')
    with pytest.raises(CheckpointError, match="three numbers each"):
        open_part(str(folder))
    with pytest.raises(CheckpointError, match="did you mean 'siglip2'"):
        open_part("sigllip2")


def test_a_hub_without_safetensors_is_asked_for_the_one_other_file(save, monkeypatch):
    folder, model = save("clip")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    asked = []

    def fetch(where: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((where, allow_patterns[-1], ignore_patterns))
        if PICKLED in allow_patterns:
            torch.save(weights, folder / PICKLED)
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    part = open_part("metaclip_b16_224")
    hub = "facebook/metaclip-b16-fullcc2.5b"
    assert asked == [(hub, "*.safetensors", ["*/*"]), (hub, PICKLED, ["*/*"])]
    assert part.config.image_num_pos == 16
