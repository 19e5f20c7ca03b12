"""The training loop: weighted loss over micro-batches and ranks, clip, step, figures, save, resume.

Gradients are those of one batch of everything that all ranks see in a step: every loss is a sum
over tokens, divided by the weights of the whole step.

Knows: `Batch`, the model, the optimizer. Does not know: where batches come from, how states are
stored and figures shown.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from molmo_core.errors import DataError, MolmoError, TrainingError
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training import ranks
from molmo_training.compute import (
    ComputeConfig,
    autocast,
    collect_at,
    prepare_blocks,
    steady_collections,
)
from molmo_training.data.example import Batch
from molmo_training.forward import Decoded
from molmo_training.loss import LossConfig, LossSums, token_loss
from molmo_training.optim import OptimConfig, Optimizer
from molmo_training.parallel.sharding import split_again

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    n_steps: int
    """Optimizer steps; the learning rate falls to its end in them."""
    seed: int = 6198
    """Of dropout and of new weights; the order of data has a seed of its own."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    log_every: int = 20
    save_every: int = 1000
    validate_every: int = 1000
    max_seconds: float | None = None
    """Wall-clock limit of the whole run; the learning rate follows whichever of steps and time is
    further on, so that a run cut by time ends with a small rate."""


class Lesson(NamedTuple):
    """A loss beside the token loss: its factor, and its mean over a batch."""

    factor: float
    loss: Tensor


class Lessons(nn.Module):
    """What else a model is taught; its parameters are trained and saved along."""

    def forward(self, decoded: Decoded, batch: Batch, progress: float) -> Mapping[str, Lesson]:
        """The losses of a batch by name; `progress` is 0 at the begin of a run and 1 at its end."""
        raise NotImplementedError


class States(Protocol):
    """Where a run is saved and found again, see `RunState`."""

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        beside: nn.Module | None,
        data: Mapping[str, Any],
        progress: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None: ...

    def restore(
        self,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        beside: nn.Module | None,
    ) -> Any: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Batches that are not learnt; the same ones each time `batches` is called."""

    name: str
    batches: Callable[[], Iterable[Batch]]


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    """Read, padding not counted."""
    loss_tokens: int = 0
    """Learnt."""
    data_shares: Mapping[str, float] = field(default_factory=dict)
    """What the run draws: the share of each dataset, for who describes it."""


class _Sums(NamedTuple):
    """Sums over the micro-batches of a step, all ranks together once they are summed."""

    cross_entropy: float
    z: float
    right: float
    weight: float
    examples: float
    tokens: float
    loss_tokens: float
    crops: float


Show = Callable[[Mapping[str, float]], None]


class Trainer:
    """Holds model and optimizer, and advances them step by step.

    `forward` runs the model on a batch; `states` keeps the run; `show` gets a line of figures now
    and then; `data_state` says where the batches stand; `stop_asked` whether to end after this
    step, the same on all ranks. `n_micro_batches` of each rank make a step; `n_copies` ranks see
    the same batch (context parallelism).
    """

    def __init__(
        self,
        model: Molmo2ForConditionalGeneration,
        config: TrainerConfig,
        *,
        forward: Callable[[Batch], Decoded],
        states: States,
        show: Show,
        lessons: Lessons | None = None,
        held_out: Sequence[HeldOut] = (),
        data_state: Callable[[], Mapping[str, Any]] = dict,
        stop_asked: Callable[[], bool] = bool,
        n_micro_batches: int = 1,
        n_copies: int = 1,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.lessons = model, config, lessons
        self.states, self.show, self.held_out = states, show, held_out
        self.forward = forward
        self.data_state, self.stop_asked = data_state, stop_asked
        self.n_micro_batches, self.n_copies = n_micro_batches, n_copies
        self.description = description or {}
        """What is saved beside the state: the settings that made it."""
        prepare_blocks(model, config.compute)
        named = list(model.named_parameters())
        if lessons is not None:
            named += [(f"image_vit_lessons.{name}", p) for name, p in lessons.named_parameters()]
        self.optimizer = Optimizer(named, config.optim)
        self.at = Progress()
        self._device = next(model.parameters()).device

    @property
    def progress(self) -> float:
        """0 at the begin, 1 when steps or time are over."""
        return max(self.at.step / self.config.n_steps, self._time_used)

    @property
    def _time_used(self) -> float:
        return self.at.seconds / self.config.max_seconds if self.config.max_seconds else 0.0

    def run(self, batches: Iterable[Batch]) -> None:
        """Train to the limit of steps or seconds, or until asked to stop; saves at the end too.

        Raises TrainingError when loss or gradients are no numbers; the model is then as it was
        before that step, and the last state on disk stays.
        """
        source, window, first_step = iter(batches), _Window(self.at), self.at.step
        with steady_collections(self.config.compute):
            while self.progress < 1:
                began = time.monotonic()
                step_batches = self._read(source)
                if len(step_batches) < self.n_micro_batches:
                    break
                waited = time.monotonic() - began
                figures = self.advance(step_batches)
                spent = time.monotonic() - began
                seconds, waited = self._agreed(spent, waited)
                self.at.seconds += seconds
                window.wait(waited)
                if self.at.step % self.config.log_every == 0:
                    self.show(self._line(figures | window.close(self.at)))
                if self.at.step % self.config.validate_every == 0:
                    self.validate()
                if self.at.step % self.config.save_every == 0 and self.progress < 1:
                    self._save_on_the_way()
                collect_at(self.at.step, self.config.compute)
                if self.stop_asked():
                    break
        is_new_end = first_step < self.at.step and self.progress >= 1
        if is_new_end and self.at.step % self.config.validate_every:
            self.validate()
        self._finish_saving()
        self.save()
        self.states.wait()

    def _read(self, source: Iterator[Batch]) -> list[Batch]:
        """The batches of a step. Where a rank cannot read them, all save what is learnt and end.

        Raises MolmoError.
        """
        data, problem, batches = self.data_state(), None, []
        try:
            batches = list(islice(source, self.n_micro_batches))
        except MolmoError as error:
            problem = error
        if self._agreed_sum(float(problem is not None)):
            self._finish_saving()
            if self.at.step:
                self.save(data)
            self.states.wait()
            raise problem or DataError("the data of another rank cannot be read; it says why")
        return batches

    def _save_on_the_way(self) -> None:
        """A disk that is full now may have room at the next save."""
        self._finish_saving()
        try:
            self.save()
        except TrainingError as error:
            logger.error("%s", error.message)

    def _finish_saving(self) -> None:
        """Let a save that fails not keep the last one from being tried."""
        try:
            self.states.wait()
        except TrainingError as error:
            logger.error("%s", error.message)

    def advance(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches; returns the figures of all ranks."""
        step, config = self.at.step + 1, self.config
        self._seed(step)
        self.model.train()
        rates = self.optimizer.set_rates(step, config.n_steps, time_used=self._time_used)
        self.optimizer.zero_grad()
        divisor = self._weight_of(batches)
        losses, lessons = self._backward(batches, divisor)
        if lessons:
            lessons = dict(zip(lessons, self._agreed(*lessons.values()), strict=True))
        sums = self._summed(batches, losses, divisor)
        figures = _means(sums, config.loss.z_weight > 0) | lessons
        if not math.isfinite(sum(figures.values())):
            raise TrainingError(
                f"the loss is {figures['loss']} at step {step}: lower the rates, or leave out the "
                "examples of this step"
            )
        ranks.sum_gradients(self.optimizer.parameters)
        norms = self.optimizer.step()
        self.at.step = step
        self.at.examples += round(sums.examples)
        self.at.tokens += round(sums.tokens)
        self.at.loss_tokens += round(sums.loss_tokens)
        figures |= {f"rate/{name}": rate for name, rate in rates.items()}
        return figures | {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def validate(self) -> dict[str, float]:
        """Loss and accuracy on each held-out set; nothing of the run is changed."""
        figures: dict[str, float] = {}
        for held_out in self.held_out:
            sums = torch.zeros(4, device=self._device)
            self.model.eval()
            with torch.no_grad():
                for batch in held_out.batches():
                    sums += torch.stack(self._losses(self._moved(batch))[0])
            split_again(self.model)
            ce, _, right, weight = ranks.sum_over_ranks(sums.double()).tolist()
            found = {"loss": ce / max(weight, 1e-9), "accuracy": right / max(weight, 1e-9)}
            figures |= {f"{held_out.name}/{name}": value for name, value in found.items()}
        self.model.train()
        if figures:
            self.show({"step": self.at.step, **figures})
        return figures

    def save(self, data: Mapping[str, Any] | None = None) -> None:
        """Keep the run as it stands; `data` where the batches stood at the last step."""
        self.states.save(
            self.at.step,
            model=self.model,
            optimizers=self.optimizer.parts,
            beside=self.lessons,
            data=self.data_state() if data is None else data,
            progress=asdict(self.at),
            config=self.description,
        )

    def resume(self) -> bool:
        """Go on from the run's last state; False when there is none."""
        saved = self.states.restore(
            model=self.model, optimizers=self.optimizer.parts, beside=self.lessons
        )
        if saved is None:
            return False
        self.at = Progress(**saved.progress)
        return True

    def _backward(
        self, batches: Sequence[Batch], divisor: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Gradients of all batches; the sums of their token losses, the means of their lessons."""
        losses = torch.zeros(4, device=self._device)
        lessons: dict[str, float] = {}
        n_batches = len(batches) * ranks.world_size() / self.n_copies
        for batch in map(self._moved, batches):
            sums, taught = self._losses(batch)
            loss = sums.total / divisor
            for name, lesson in taught.items():
                loss = loss + lesson.factor * lesson.loss / n_batches
                lessons[name] = lessons.get(name, 0.0) + lesson.loss.item() / len(batches)
            torch.autograd.backward(loss)
            losses += torch.stack([value.detach() for value in sums])
        return losses, lessons

    def _losses(self, batch: Batch) -> tuple[LossSums, Mapping[str, Lesson]]:
        with autocast(self.config.compute, self._device):
            decoded = self.forward(batch)
            head = self.model.lm_head.weight
            sums = token_loss(
                decoded.hidden, head, decoded.targets, decoded.weights, self.config.loss
            )
            if self.lessons is None or not self.model.training:
                return sums, {}
            taught: Mapping[str, Lesson] = self.lessons(decoded, batch, self.progress)
            return sums, taught

    def _weight_of(self, batches: Sequence[Batch]) -> float:
        """The weights of all that is learnt in a step, by all ranks."""
        mine = sum(float(batch.weights.sum(dtype=torch.float64)) for batch in batches)
        weight = self._agreed_sum(mine) / self.n_copies
        if not weight > 0:
            raise TrainingError(
                f"step {self.at.step + 1} has no token to learn: give some dataset a loss factor "
                "above 0"
            )
        return weight

    def _agreed_sum(self, value: float) -> float:
        values = torch.tensor([value], dtype=torch.float64, device=self._device)
        return float(ranks.sum_over_ranks(values))

    def _agreed(self, *values: float) -> list[float]:
        """Means over the ranks, so that all of them decide alike."""
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        found: list[float] = (ranks.sum_over_ranks(summed) / ranks.world_size()).tolist()
        return found

    def _summed(self, batches: Sequence[Batch], losses: Tensor, weight: float) -> _Sums:
        counts = list(map(counted, batches))
        extra = torch.tensor(counts, dtype=torch.float64, device=self._device).sum(0)
        extra /= self.n_copies
        summed = ranks.sum_over_ranks(torch.cat([losses.double(), extra])).tolist()
        return _Sums(*(*summed[:3], weight, *summed[4:]))

    def _seed(self, step: int) -> None:
        """Dropout follows from seed, step and rank alone: a resumed run draws the same."""
        words = np.random.SeedSequence([self.config.seed, step, ranks.rank()])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))

    def _moved(self, batch: Batch) -> Batch:
        if self._device.type == "cpu":
            return batch
        moved: dict[str, Any] = {
            f.name: value.to(self._device, non_blocking=True)
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), Tensor)
        }
        return replace(batch, **moved)

    def _line(self, figures: Mapping[str, float]) -> dict[str, float]:
        place = {"step": self.at.step, "examples": self.at.examples}
        rounded = {name: round(value, 9) for name, value in figures.items()}
        return {**place, "seconds": round(self.at.seconds, 1), **rounded}


class _Window:
    """The steps since the last line of figures, for throughput."""

    def __init__(self, at: Progress) -> None:
        self._begin, self._waited_s = replace(at), 0.0

    def wait(self, seconds: float) -> None:
        self._waited_s += seconds

    def close(self, at: Progress) -> dict[str, float]:
        """Figures a second, of all ranks together; begins anew."""
        before, waited_s = self._begin, self._waited_s
        self._begin, self._waited_s = replace(at), 0.0
        seconds = max(at.seconds - before.seconds, 1e-9)
        return {
            "tokens_per_s": (at.tokens - before.tokens) / seconds,
            "loss_tokens_per_s": (at.loss_tokens - before.loss_tokens) / seconds,
            "examples_per_s": (at.examples - before.examples) / seconds,
            "data_wait_share": waited_s / seconds,
        }


def counted(batch: Batch) -> tuple[int, int, int, int]:
    """Examples, tokens without padding, tokens that are learnt, crops."""
    n_learnt = int((batch.weights > 0).sum())
    return batch.n_examples, int(batch.valid.sum()), n_learnt, len(batch.crops)


def _means(sums: _Sums, has_z: bool) -> dict[str, float]:
    figures = {
        "loss": sums.cross_entropy / sums.weight,
        "accuracy": sums.right / sums.weight,
        "tokens": sums.tokens,
        "loss_tokens": sums.loss_tokens,
        "loss_weight": sums.weight,
        "crops": sums.crops,
    }
    return figures | ({"z_loss": sums.z / sums.weight} if has_z else {})
