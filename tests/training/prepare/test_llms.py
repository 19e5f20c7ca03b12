"""Language models as Molmo2's decoder: every layer computes what transformers computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_core.errors import CheckpointError
from molmo_hf.export import EMBEDDING, HEAD
from molmo_hf.modeling_molmo2 import Molmo2Decoder, attention_mask
from molmo_training.prepare.llms import NEW_EMBEDDING
from molmo_training.prepare.parts import LlmPart, open_part, write_part

N_POSITIONS = 200


def layer_outputs(part: LlmPart, ids: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings, the outputs of all layers but the last, and the last after its norm."""
    decoder = Molmo2Decoder(part.config).eval()
    state = {n: part.weights.read(n) for n in part.weights.shapes() if n != HEAD}
    state[NEW_EMBEDDING] = torch.zeros_like(decoder.wte.new_embedding)
    decoder.load_state_dict({n.removeprefix("model.transformer."): t for n, t in state.items()})
    outputs: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.inference_mode():
        x = decoder.wte(ids)
        positions = torch.arange(ids.shape[1])[None]
        last = decoder(x, positions, attention_mask(torch.ones_like(ids, dtype=torch.bool)))
    return [x, *outputs[:-1], last]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False, "rope_theta": 5e6}),
        ("olmo3", {}),
        ("olmo3", {"rope_scaling": None}),
    ],
)
def test_every_layer_is_that_of_transformers(save, kind, fields):
    folder, model = save(kind, **fields)
    part = open_part(str(folder))
    assert isinstance(part, LlmPart)
    ids = torch.randint(0, 300, (1, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True)
    ours = layer_outputs(part, ids)
    assert len(ours) == len(theirs.hidden_states) == 5
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    head = part.weights.read(EMBEDDING if part.config.tie_word_embeddings else HEAD)
    logits = ours[-1] @ head.T
    assert (logits - theirs.logits).abs().max() <= 1e-5 * theirs.logits.abs().max()


def test_yarn_is_on_the_layers_that_attend_to_all(save):
    part = open_part(str(save("olmo3")[0]))
    assert part.config.rope_scaling_layers == [1, 3]
    assert part.config.rope_parameters["rope_type"] == "yarn"
    assert part.config.norm_after
    assert part.config.rope_parameters["attention_factor"] == 1.2079441541679836


def test_a_prepared_part_is_the_same_part(save, tmp_path):
    folder, _ = save("qwen3")
    part = open_part("qwen3_4b", source=str(folder))
    again = open_part(str(write_part(part, tmp_path / "part", dtype=torch.float32)))
    assert again.name == "qwen3_4b"
    assert again.config.to_dict() == part.config.to_dict()
    assert again.tokenizer.get_vocab() == part.tokenizer.get_vocab()
    shapes = part.weights.shapes()
    assert again.weights.shapes() == shapes
    assert HEAD not in shapes
    assert all(torch.equal(again.weights.read(n), part.weights.read(n)) for n in shapes)
    with pytest.raises(CheckpointError, match="never overwritten"):
        write_part(part, tmp_path / "part", dtype=torch.float32)


def test_fused_projections_are_in_molmo2s_order(save):
    folder, model = save("qwen3")
    part, layer = open_part(str(folder)), model.model.layers[0]
    fused = part.weights.read("model.transformer.blocks.0.self_attn.att_proj.weight")
    parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    assert torch.equal(fused, torch.cat([p.weight for p in parts]))
    fused = part.weights.read("model.transformer.blocks.0.mlp.ff_proj.weight")
    assert torch.equal(fused, torch.cat([layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias of the language model is True"),
        ({"hidden_act": "gelu"}, "hidden_act of the language model is 'gelu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"num_hidden_layers": 5}, r"lack layers\.4\.input_layernorm\.weight; .* 6 more"),
        ({"num_hidden_layers": 3}, r"hold layers\.3\..*which this architecture does not have"),
        ({"intermediate_size": 90}, r"shape of .*ff_proj\.weight: \(192, 64\), expected"),
        ({"model_type": "llama"}, "model_type 'llama'; .*'qwen3', 'olmo3'"),
        ({"model_type": "none_such"}, "configuration .* cannot be read"),
        ({"hidden_size": "64"}, "configuration .* cannot be read"),
        ({"num_key_value_heads": 3}, r"shape of .*att_proj\.weight: \(256, 64\), expected"),
    ],
)
def test_what_does_not_fit_is_refused(save, change, message):
    folder, _ = save("qwen3")
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        open_part(str(folder))


def test_projections_of_other_widths_are_refused(save):
    folder, _ = save("qwen3")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"k_proj.* from which .*att_proj.* cannot be made"):
        open_part(str(folder))


def test_a_folder_without_tokenizer_or_weights_is_refused(save, tmp_path):
    folder, _ = save("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of 'qwen3' cannot be read"):
        open_part(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        open_part(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_part(str(folder))
