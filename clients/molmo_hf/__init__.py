"""Molmo2 as Hugging Face classes: configuration, processors, tokenizer building, model, export.

`register()` makes transformers' Auto classes know them, without remote code. Names are loaded
when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_hf.configuration_molmo2 import Molmo2Config, Molmo2TextConfig
    from molmo_hf.export import load_processor, save_checkpoint
    from molmo_hf.image_processing_molmo2 import Molmo2ImageProcessor
    from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
    from molmo_hf.processing_molmo2 import Molmo2Processor
    from molmo_hf.tokenizer import build_tokenizer, train_tokenizer
    from molmo_hf.video_processing_molmo2 import Molmo2VideoProcessor

__all__ = [
    "Molmo2Config",
    "Molmo2ForConditionalGeneration",
    "Molmo2ImageProcessor",
    "Molmo2Processor",
    "Molmo2TextConfig",
    "Molmo2VideoProcessor",
    "build_tokenizer",
    "load_processor",
    "register",
    "save_checkpoint",
    "train_tokenizer",
]

_HOME = {
    "Molmo2Config": "configuration_molmo2",
    "Molmo2ForConditionalGeneration": "modeling_molmo2",
    "Molmo2ImageProcessor": "image_processing_molmo2",
    "Molmo2Processor": "processing_molmo2",
    "Molmo2TextConfig": "configuration_molmo2",
    "Molmo2VideoProcessor": "video_processing_molmo2",
    "build_tokenizer": "tokenizer",
    "load_processor": "export",
    "save_checkpoint": "export",
    "train_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def register() -> None:
    """Make transformers' Auto classes know Molmo2. Safe to call again."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoVideoProcessor,
    )

    from molmo_hf.configuration_molmo2 import Molmo2Config, Molmo2TextConfig
    from molmo_hf.image_processing_molmo2 import Molmo2ImageProcessor
    from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
    from molmo_hf.processing_molmo2 import Molmo2Processor
    from molmo_hf.video_processing_molmo2 import Molmo2VideoProcessor

    AutoConfig.register("molmo2", Molmo2Config, exist_ok=True)
    AutoConfig.register("molmo2_text", Molmo2TextConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        Molmo2Config, Molmo2ForConditionalGeneration, exist_ok=True
    )
    # One class for both of transformers' ways: it does the arithmetic itself.
    AutoImageProcessor.register(
        Molmo2Config,
        image_processor_classes={
            "pil": Molmo2ImageProcessor,
            "torchvision": Molmo2ImageProcessor,
        },
        exist_ok=True,
    )
    AutoVideoProcessor.register(Molmo2Config, Molmo2VideoProcessor, exist_ok=True)
    AutoProcessor.register(Molmo2Config, Molmo2Processor, exist_ok=True)
