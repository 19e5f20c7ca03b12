"""The training loop of one process: forward, weighted loss, clip, step, log, save, resume.

Knows: `Batch`, the model, the optimizer. Does not know: where batches come from.
A run is a folder: `log.jsonl` (a line every few steps), `state.pt` (everything to go on).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration, attention_mask
from molmo_training.checkpoints.publish import Publishing
from molmo_training.data.example import Batch
from molmo_training.loss import AttentionGuide, ObjectProbes, token_loss
from molmo_training.optim import OptimConfig, Optimizer
from molmo_training.runs.log import append_figures


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    folder: Path
    max_steps: int
    optim: OptimConfig = field(default_factory=OptimConfig)
    autocast_bf16: bool = True
    probe_weight: float = 1.0
    """Weight of the losses of `ObjectProbes`; 0 trains without them."""
    guide_weight: float = 0.5
    """Weight at the start of the loss on where to look, see `AttentionGuide`; falls to 0."""
    guided_layer: int = 2
    guided_heads: int = 3
    log_every: int = 20
    save_every: int = 100
    publishing: Publishing | None = None
    """Makes every saved state a checkpoint that servers may follow."""
    max_seconds: float | None = None
    """Wall-clock limit of the whole run; the learning rate follows whichever of steps and time is
    further on, so that a run cut by time ends with a small rate."""


class Trainer:
    """Holds model, probe and optimizer, and advances them batch by batch."""

    def __init__(
        self, model: Molmo2ForConditionalGeneration, probe: ObjectProbes, config: TrainerConfig
    ) -> None:
        self.model, self.probe, self.config = model, probe, config
        decoder = model.model.transformer
        self.guide = AttentionGuide(
            decoder.blocks[config.guided_layer].self_attn, config.guided_heads
        )
        self.optimizer = Optimizer(_Joint(model, probe).named_parameters(), config.optim)
        self.step = 0
        self.seconds = 0.0
        self.examples = 0
        self._saved_step: int | None = None

    def run(self, batches: Iterable[Batch]) -> None:
        """Train until the limit of steps or seconds; logs and saves on the way and at the end."""
        self.config.folder.mkdir(parents=True, exist_ok=True)
        self.model.train()
        for batch in batches:
            started = time.monotonic()
            figures = self.advance(batch)
            self.seconds += time.monotonic() - started
            if self.step % self.config.log_every == 0:
                self._log(figures, batch)
            if self.step % self.config.save_every == 0:
                self.save()
            if self.progress >= 1:
                break
        if self._saved_step != self.step:
            self.save()

    @property
    def progress(self) -> float:
        by_time = self.seconds / self.config.max_seconds if self.config.max_seconds else 0.0
        return max(self.step / self.config.max_steps, by_time)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; returns the figures of it."""
        rate = self.optimizer.set_rate(self.progress, self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast_bf16):
            loss, accuracy, probe_loss, guide_loss = self.losses(batch)
        guide_weight = self.config.guide_weight * (1 - min(self.progress, 1.0))
        total = loss + self.config.probe_weight * probe_loss + guide_weight * guide_loss
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total.item()} at step {self.step}; lower the rate")
        norms = self.optimizer.step(total)
        self.step += 1
        self.examples += batch.n_examples
        return {
            "loss": loss.item(),
            "accuracy": accuracy.item(),
            "probe_loss": probe_loss.item(),
            "guide_loss": guide_loss.item(),
            "rate": rate,
            **{f"grad_norm/{k}": v for k, v in norms.items()},
        }

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token loss, share of tokens right, the tower's own loss, the loss on where to look."""
        backbone = self.model.model.vision_backbone
        patches = backbone.encode(batch.crops)
        features = backbone.pool(patches, batch.pooling)
        hidden = self._decode(batch, features)
        learnt = batch.weights > 0
        logits = self.model.lm_head(hidden[learnt])
        loss, accuracy = token_loss(logits, batch.targets[learnt], batch.weights[learnt])
        probe_loss = self.probe(patches, batch.patch_targets, features, batch.token_targets)
        return loss, accuracy, probe_loss, self.guide(batch.about, batch.shows)

    def _decode(self, batch: Batch, features: Tensor) -> Tensor:
        config = self.model.config
        visual = None
        if config.bidirectional == "all":
            visual = torch.isin(batch.input_ids, torch.tensor(config.visual_token_ids))
        mask = attention_mask(batch.valid, visual, batch.subsegments)
        x = self.model.model.embed(batch.input_ids, features)
        hidden: Tensor = self.model.model.transformer(x, batch.position_ids, mask)
        return hidden

    def save(self) -> None:
        """Write everything needed to go on; the file is replaced as a whole."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "examples": self.examples,
        }
        partial = self.config.folder / "state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.config.folder / "state.pt")
        self._saved_step = self.step
        if self.config.publishing is not None:
            self.config.publishing.publish(self.config.folder)

    def resume(self) -> bool:
        """Go on from the run folder's state; False when there is none."""
        path = self.config.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.examples = state["examples"]
        return True

    def _log(self, figures: dict[str, float], batch: Batch) -> None:
        line = {
            "step": self.step,
            "examples": self.examples,
            "seconds": round(self.seconds, 1),
            "tokens": int(batch.valid.sum()),
            **{k: round(v, 5) for k, v in figures.items()},
        }
        append_figures(self.config.folder, line)


class _Joint(torch.nn.Module):
    """Model and probe under one roof, for the optimizer."""

    def __init__(self, model: torch.nn.Module, probe: ObjectProbes) -> None:
        super().__init__()
        self.model = model
        self.image_vit_probe = probe
