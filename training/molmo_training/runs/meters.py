"""Figures of a run: how fast it is and when it ends, on the console and wherever else they go.

Knows: time, counts of tokens, the places that figures are written to. Does not know: where the
figures come from, how they are added up over ranks: rank 0 meters, with those of the whole run.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

import torch

RATES = ("tokens_per_s", "left_s", "memory_gb")
"""Figures that meters add."""
_PACE_LINES = 50
"""Lines of the log over which the pace of what is left is measured."""


class Sink(Protocol):
    """A place for figures; `step` is one of them."""

    def write(self, line: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Meters:
    """Counts what is trained on, and writes figures with rates to every sink."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        max_steps: int,
        first_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sinks, self._max_steps, self._clock = sinks, max_steps, clock
        self._lines = deque([(clock(), first_step)], maxlen=_PACE_LINES)
        self._n_tokens = 0
        self._aside_s = 0.0

    def count(self, n_tokens: int) -> None:
        """So many tokens, paddings left out, were trained on since the last call."""
        self._n_tokens += n_tokens

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training's, such as validation: left out of the tokens a second."""
        began_s = self._clock()
        try:
            yield
        finally:
            self._aside_s += self._clock() - began_s

    def log(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        """Write the figures of `step` with tokens_per_s, left_s and memory_gb; returns them."""
        now_s = self._clock()
        trained_s = now_s - self._lines[-1][0] - self._aside_s
        self._lines.append((now_s, step))
        (began_s, began), n_left = self._lines[0], self._max_steps - step
        line = {"step": step, **_rounded(figures)}
        if self._n_tokens and trained_s > 0:
            line["tokens_per_s"] = round(self._n_tokens / trained_s, 1)
        if step > began:
            line["left_s"] = round((now_s - began_s) / (step - began) * max(n_left, 0), 1)
        line["memory_gb"] = round(memory_bytes() / 1e9, 3)
        self._n_tokens, self._aside_s = 0, 0.0
        for sink in self._sinks:
            sink.write(line)
        return line

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures as they are, such as those of a validation."""
        for sink in self._sinks:
            sink.write({"step": step, **_rounded(figures)})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class Console:
    """A line that a terminal draws again in its place; elsewhere one line after the other."""

    def __init__(self, *, max_steps: int, stream: TextIO | None = None) -> None:
        self._stream, self._max_steps = stream or sys.stderr, max_steps
        self._redraws = self._stream.isatty()
        self._is_drawn = False

    def write(self, line: Mapping[str, float]) -> None:
        text = _told(line, self._max_steps)
        if self._redraws:
            n_columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r\x1b[2K{text[: n_columns - 1]}")
            self._is_drawn = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that a terminal shows."""
        if self._is_drawn:
            self._stream.write("\n")
            self._stream.flush()


def memory_bytes() -> int:
    """The most that this process has used: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    kibibytes: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Six digits of each; whole numbers stay."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}


def _told(line: Mapping[str, float], max_steps: int) -> str:
    """`step 20/400  loss 1.2345  5120 tokens/s  2 h 05 min left  3.1 GB`."""
    figures = {k: v for k, v in line.items() if k not in ("step", *RATES)}
    shown = {"loss": figures["loss"]} if "loss" in figures else figures
    parts = [f"step {line['step']:.0f}/{max_steps}"]
    parts += [f"{name} {value:.4f}" for name, value in shown.items()]
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:.0f} tokens/s")
    if "left_s" in line:
        parts.append(f"{_duration(line['left_s'])} left")
    if "memory_gb" in line:
        parts.append(f"{line['memory_gb']:.1f} GB")
    return "  ".join(parts)


def _duration(duration_s: float) -> str:
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
