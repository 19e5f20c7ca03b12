"""Every architecture variant over all conversations: engine against plain forward, as a table.

    python -m tests.soak.engine_parity [--variants qwen3 olmo3 …] [--steps 64]

Ends with status 1 when a variant exceeds the tolerance, or when vLLM's own Molmo2 does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from molmo_server.engine.plugin import STOCK_SWITCH
from tests.support.checkpoint import VARIANTS, write_checkpoint
from tests.support.conversations import many_conversations
from tests.support.engine import RunningEngine, running_engine
from tests.support.parity import TOLERANCE, Difference, ask, compare
from tests.support.reference import Reference

_HEAD = "variant      prompts  max |Δ| prompt  max |Δ| answer  greedy  at once  start s  run s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    print(_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        is_good = [_run(v, Path(folder), arguments.steps) for v in arguments.variants]
        is_good.append(_run("qwen3", Path(folder), 8, is_stock=True))
    return 0 if all(is_good) else 1


def _run(variant: str, folder: Path, n_steps: int, *, is_stock: bool = False) -> bool:
    """Print a row; True when the result is the expected one."""
    folder = folder / f"{variant}{'-stock' * is_stock}"
    checkpoint = write_checkpoint(folder / "checkpoint", variant)
    reference = Reference(checkpoint)
    environment = {STOCK_SWITCH: "1"} if is_stock else {}
    begun = time.monotonic()
    with running_engine(checkpoint, folder, environment=environment) as engine:
        ready = time.monotonic()
        found = _differences(engine, reference, n_steps, at_once=1)
        beside = [] if is_stock else _differences(engine, reference, n_steps, at_once=8)
    ended = time.monotonic()
    prompt, answer = (max(getattr(d, part) for d in found) for part in ("prompt", "answer"))
    greedy = sum(d.greedy_equal and d.prompt_ids_equal for d in found)
    largest_beside = max((d.answer for d in beside), default=float("nan"))
    name = "vLLM's own" if is_stock else variant
    print(
        f"{name:12} {len(found):7} {prompt:15.1e} {answer:15.1e} {greedy:4}/{len(found)} "
        f"{largest_beside:8.1e} {ready - begun:8.0f} {ended - ready:6.0f}",
        flush=True,
    )
    if is_stock:
        return max(prompt, answer) > 1e-2
    is_equal = all(d.greedy_equal for d in beside) and greedy == len(found)
    return is_equal and max(prompt, answer, largest_beside) <= TOLERANCE


def _differences(
    engine: RunningEngine, reference: Reference, n_steps: int, *, at_once: int
) -> list[Difference]:
    """With several at once the prompt's values are not asked for, so that the cache is read."""
    conversations = many_conversations()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(
            pool.map(
                lambda c: ask(engine, c, n_steps=n_steps, with_prompt=at_once == 1), conversations
            )
        )
    return [compare(a, reference, c) for a, c in zip(answers, conversations, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
