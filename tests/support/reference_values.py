"""The reference values in tests/golden/parity: cases, media, processor, the two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.image_processing_molmo2 import Molmo2ImageProcessor
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_hf.video_processing_molmo2 import Molmo2VideoProcessor

FOLDER = Path(__file__).parents[1] / "golden" / "parity"
ARCHITECTURES = ("qwen3", "olmo3")
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())


def reference_tensors() -> dict[str, Tensor]:
    return load_file(FOLDER / "reference.safetensors")


def reference_config(architecture: str) -> Molmo2Config:
    return Molmo2Config(**json.loads((FOLDER / architecture / "config.json").read_text()))


def reference_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"),
        bos_token="<|im_end|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def reference_processor() -> Molmo2Processor:
    settings = json.loads((FOLDER / "processor.json").read_text())
    return Molmo2Processor(
        Molmo2ImageProcessor(**settings["image_processor"]),
        Molmo2VideoProcessor(**settings["video_processor"]),
        reference_tokenizer(),
        **settings["processor"],
    )


def reference_model(architecture: str) -> Molmo2ForConditionalGeneration:
    model = Molmo2ForConditionalGeneration(reference_config(architecture)).eval()
    model.load_state_dict(reference_weights(model, architecture))
    return model


def reference_weights(model: torch.nn.Module, architecture: str) -> dict[str, Tensor]:
    """Draw the weights of the reference's files; their sums say that they are the same."""
    told = json.loads((FOLDER / "weights.json").read_text())
    generator = torch.Generator().manual_seed(told["seed"])
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    weights = {}
    for name in told["order"]:
        drawn = torch.randn(shapes[name], generator=generator)
        weights[name] = drawn * _scale(name) + float(_is_norm(name) and name.endswith("weight"))
    total = sum(float(w.double().abs().sum()) for w in weights.values())
    expected = told["sums_of_sizes"][architecture]
    assert abs(total / expected - 1) < 1e-9, f"torch drew other numbers: {total} for {expected}"
    return weights


def _is_norm(name: str) -> bool:
    return "norm." in name or "ln_f." in name


def _scale(name: str) -> float:
    if _is_norm(name):
        return 0.1
    if name.endswith("bias"):
        return 0.05
    return 0.09 if "vision_backbone" in name else 0.12


def media_of(case: str) -> dict[str, Any]:
    """The case's pictures or frames, as a caller hands them over."""
    clip = FOLDER / "media" / f"{case}.npz"
    if clip.exists():
        arrays = np.load(clip)
        metadata = {
            "fps": float(arrays["fps"]),
            "frames_indices": arrays["frames_indices"].tolist(),
            "total_num_frames": int(arrays["total_num_frames"]),
        }
        return {"videos": [arrays["frames"]], "video_metadata": [metadata]}
    pictures = sorted((FOLDER / "media").glob(f"{case}_*.png"))
    return {"images": [Image.open(p) for p in pictures]} if pictures else {}


def inputs_of(case: str, processor: Molmo2Processor) -> Any:
    return processor(text=CASES[case]["text"], return_tensors="pt", **media_of(case))
