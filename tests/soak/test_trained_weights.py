"""What training begins and ends with, in real engines: starting weights, merged adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from molmo_training.checkpoints.adapters import save_adapters, trained_state
from molmo_training.checkpoints.convert import to_hugging_face
from molmo_training.checkpoints.opened import load_model, open_checkpoint
from molmo_training.lora import CONNECTOR, DECODER, TOWER, LoraConfig, add_adapters
from molmo_training.prepare.initial import build_initial
from molmo_training.prepare.parts import open_part
from tests.support.checkpoint import write_checkpoint
from tests.support.conversations import few_conversations
from tests.support.engine import Wanted, engines_side_by_side
from tests.support.parity import TOLERANCE, distance
from tests.support.pretrained import save_pretrained
from tests.support.reference import Reference

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

N_STEPS = 16


def write_started(folder: Path) -> Path:
    """Starting weights of a decoder with tied head and a tower with class token."""
    save_pretrained(folder / "llm", "qwen3", max_position_embeddings=8192, num_attention_heads=2)
    save_pretrained(folder / "vit", "dinov2", image_size=518, patch_size=14)
    parts = open_part(str(folder / "llm")), open_part(str(folder / "vit"), input_px=378)
    return build_initial(*parts, folder / "started", vit_layers=(-1, -3))


def write_adapted(folder: Path) -> tuple[Path, torch.nn.Module]:
    """A merged export, and the model with the adapters that were merged into it."""
    start = write_checkpoint(folder / "start", "qwen3")
    model = load_model(open_checkpoint(start))
    config = LoraConfig(rank=4, targets=DECODER + CONNECTOR + TOWER)
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    save_adapters(trained_state(model), folder / "adapters", config, start=start)
    opened = open_checkpoint(folder / "adapters")
    return to_hugging_face(opened, folder / "merged"), model.eval()


def test_engines_serve_starting_weights_and_merged_adapters(tmp_path, show):
    started = write_started(tmp_path)
    merged, model = write_adapted(tmp_path)
    folders = {"started": started, "merged": merged, "start": tmp_path / "start"}
    references = {name: Reference(folder) for name, folder in folders.items()}
    references["merged"].model = model
    wanted = {"started": Wanted(checkpoint=started), "merged": Wanted(checkpoint=merged)}
    with engines_side_by_side(wanted, tmp_path) as engines:
        largest = {
            name: max(
                distance(engine, references[name], conversation, n_steps=N_STEPS)
                for conversation in few_conversations()
            )
            for name, engine in engines.items()
        }
        unmerged = distance(
            engines["merged"], references["start"], few_conversations()[0], n_steps=N_STEPS
        )
    show(f"{largest}, {len(few_conversations())} prompts; without adapters {unmerged:.2g}")
    assert max(largest.values()) <= TOLERANCE
    assert unmerged > 0.1
