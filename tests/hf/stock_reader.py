"""Read exported folders with stock transformers and say what came out, as JSON.

Run: python stock_reader.py PARITY_FOLDER EXPORT... > answers.json. Our packages cannot be imported
here: only the code that a folder carries is used. Works with transformers 5 and 4.57.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASES = ("two_images", "video_25fps_13f", "text_only")


class NotInstalled:
    """An import finder that refuses our packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0].startswith("molmo_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())

import numpy as np  # noqa: E402 - after the finder
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402


def media_of(parity: Path, case: str) -> dict[str, Any]:
    clip = parity / "media" / f"{case}.npz"
    if clip.exists():
        arrays = np.load(clip)
        told = {
            "fps": float(arrays["fps"]),
            "frames_indices": arrays["frames_indices"].tolist(),
            "total_num_frames": int(arrays["total_num_frames"]),
        }
        return {"videos": [arrays["frames"]], "video_metadata": [told]}
    pictures = sorted((parity / "media").glob(f"{case}_*.png"))
    return {"images": [Image.open(p) for p in pictures]} if pictures else {}


@torch.no_grad()
def answers_of(folder: Path, parity: Path) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    told = json.loads((parity / "cases.json").read_text())
    answers: dict[str, Any] = {
        "module": type(model).__module__,
        "dtype": str(model.dtype),
        "eos": model.generation_config.eos_token_id,
        "chat": chat_of(processor, parity),
    }
    for case in CASES:
        text = told[case]["text"]
        inputs = processor(text=text, return_tensors="pt", **media_of(parity, case))
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        n_prompt = inputs["input_ids"].shape[1]
        answers[case] = {
            "ids": inputs["input_ids"][0].tolist(),
            "last_logprobs": torch.log_softmax(model(**inputs).logits[0, -1], -1).tolist(),
            "greedy": ids[0, n_prompt:].tolist(),
        }
    processor.save_pretrained(folder / "saved")
    model.save_pretrained(folder / "saved")
    return answers


def chat_of(processor: Any, parity: Path) -> list[int]:
    path = parity / "media" / "image_57x43_0.png"
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "Hi 12"}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    return ids[0].tolist()


def main(arguments: Sequence[str]) -> None:
    parity, *folders = map(Path, arguments)
    answers = {folder.name: answers_of(folder, parity) for folder in folders}
    json.dump({"transformers": transformers.__version__, **answers}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
