"""Whether two checkpoints compute the same: logits of both on fixed prompts.

Knows: the prompts, which follow from a seed, and what to compare. Does not know: forms, layouts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from molmo_core.clips import draw_frames, sample_clip
from molmo_core.prompts import Turn, render_chat, verb_prompt
from molmo_core.scenes import draw_scene, sample_scene
from molmo_core.videos import sample_times
from molmo_hf.processing_molmo2 import Molmo2Processor
from molmo_training.checkpoints.opened import OpenedCheckpoint, load_model

_SEED = 20_261_123
_N_FRAMES = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one prompt; log-probabilities are natural, over the base vocabulary."""

    prompt: str
    n_tokens: int
    is_same_ids: bool
    max_logprob: float
    """Greatest difference over all positions and tokens; NaN when the ids differ."""
    n_other_choices: int
    """Positions where the most probable token differs."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def compare(
    a: OpenedCheckpoint, b: OpenedCheckpoint, *, tokenizer: str | None = None
) -> list[Difference]:
    """Logits of `a` and `b` in float32 on the same prompts: text, pictures of two sizes, a clip.

    One model is in memory at a time. `tokenizer`: for native ones. Raises CheckpointError.
    """
    first, second = (_log_probabilities(opened, tokenizer) for opened in (a, b))
    differences = []
    for name, (ids_a, table_a) in first.items():
        ids_b, table_b = second[name]
        is_same = ids_a == ids_b and table_a.shape == table_b.shape
        delta = (table_a - table_b).abs().max().item() if is_same else float("nan")
        others = int((table_a.argmax(-1) != table_b.argmax(-1)).sum()) if is_same else len(ids_a)
        differences.append(
            Difference(
                prompt=name,
                n_tokens=len(ids_a),
                is_same_ids=is_same,
                max_logprob=delta,
                n_other_choices=others,
            )
        )
    return differences


def _log_probabilities(
    opened: OpenedCheckpoint, tokenizer: str | None
) -> dict[str, tuple[list[int], Tensor]]:
    """Per prompt: token ids, and log-probabilities (S, V)."""
    model = load_model(opened)
    processor = opened.processor(tokenizer)
    answers = {}
    for name, inputs in inputs_of(processor).items():
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        answers[name] = (inputs["input_ids"][0].tolist(), logits.float().log_softmax(-1))
    return answers


def inputs_of(processor: Molmo2Processor) -> dict[str, dict[str, Tensor]]:
    """What the model takes for each of the prompts, by name."""
    rng = np.random.default_rng(_SEED)
    small, large = (
        draw_scene(sample_scene(rng, min_side_px=low, max_side_px=high))
        for low, high in ((160, 200), (500, 800))
    )
    clip = sample_clip(rng)
    length_s = clip.n_frames / float(clip.frame_rate)
    times = sample_times(length_s, processor.video_geometry(), source_fps=clip.fps)[:_N_FRAMES]
    frames = np.stack(list(draw_frames(clip, times)))
    cases: dict[str, tuple[str, dict[str, object]]] = {
        "text": ("What do you see?", {}),
        "small picture": (verb_prompt("point", "stars"), {"images": [small]}),
        "large picture": (verb_prompt("caption"), {"images": [large]}),
        "two pictures": (verb_prompt("count", "stars", n_images=2), {"images": [small, large]}),
        "clip": (
            verb_prompt("track", "stars", has_video=True),
            {"videos": [frames], "video_metadata": [{"frame_times_s": times}]},
        ),
    }
    prepared = {}
    for name, (question, media) in cases.items():
        text = render_chat(
            [Turn(role="user", text=question)],
            n_images=len(media.get("images", ())),  # type: ignore[arg-type]
            n_videos=len(media.get("videos", ())),  # type: ignore[arg-type]
        )
        prepared[name] = dict(processor(text=text, return_tensors="pt", **media))
    return prepared
