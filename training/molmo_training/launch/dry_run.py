"""What a run would do, told before it: shares, tokens a step, parameters, memory.

Knows: a plan and a few drawn packs. Does not know: weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from molmo_training.data.mixture import shares_table
from molmo_training.data.stream import PackedStream
from molmo_training.launch.memory import estimated
from molmo_training.launch.plan import Plan
from molmo_training.trainer import counted

N_PACKS = 8
"""Packs that are drawn to tell the mean size; each costs what its media cost to open."""
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PackFigures:
    """Means of some packs."""

    n_packs: int
    n_examples: float
    n_tokens: float
    n_loss_tokens: float
    n_crops: float


def report(plan: Plan, *, n_ranks: int = 1) -> str:
    """Raises DataError when the data cannot be drawn."""
    config = plan.config
    data, packs = config.data, measured(plan)
    per_step = data.packs_per_step
    n_examples = round(packs.n_examples * per_step * config.n_steps)
    fill = packs.n_tokens / data.budgets.n_tokens
    lines = [
        f"{config.recipe}: {config.n_steps:,} steps of {per_step} packs, "
        f"{n_ranks} rank{'s' if n_ranks > 1 else ''}",
        "",
        shares_table(data.mixture, plan.sizes, n_examples),
        "",
        f"a pack   {packs.n_examples:,.1f} examples, {packs.n_tokens:,.0f} tokens "
        f"({fill:.1%} of {data.budgets.n_tokens:,}), {packs.n_loss_tokens:,.0f} of them learnt, "
        f"{packs.n_crops:,.1f} crops of {data.budgets.n_crops} (mean of {packs.n_packs} packs)",
        f"a step   {packs.n_examples * per_step:,.0f} examples, "
        f"{packs.n_tokens * per_step:,.0f} tokens, "
        f"{packs.n_loss_tokens * per_step:,.0f} of them learnt",
        f"the run  {n_examples:,} examples, "
        f"{packs.n_tokens * per_step * config.n_steps / 1e9:,.3f} B tokens",
        "",
        f"{'parameters':12s} {'trained':>16s} {'frozen':>16s}",
        *(f"{c.group:12s} {c.n_trained:16,d} {c.n_frozen:16,d}" for c in plan.counts),
        "",
        *_memory(plan, n_ranks),
    ]
    return "\n".join(lines)


def measured(plan: Plan) -> PackFigures:
    """Sizes of the first packs of the run, one after the other."""
    stream = PackedStream(plan.stream_config, plan.sources)
    n_batches = max(N_PACKS // plan.config.data.packs_per_batch, 1)
    batches = [counted(batch) for batch in islice(stream, n_batches)]
    n_packs = n_batches * plan.config.data.packs_per_batch
    examples, tokens, learnt, crops = (
        sum(column) / n_packs for column in zip(*batches, strict=True)
    )
    return PackFigures(
        n_packs=n_packs,
        n_examples=examples,
        n_tokens=tokens,
        n_loss_tokens=learnt,
        n_crops=crops,
    )


def _memory(plan: Plan, n_ranks: int) -> list[str]:
    memory = estimated(plan, n_ranks)
    return [
        "memory of a rank, estimated",
        f"  weights, gradients, optimizer  {memory.held / _GIB:8.2f} GiB",
        f"  activations of a batch         {memory.activations / _GIB:8.2f} GiB",
        f"  together                       {memory.together / _GIB:8.2f} GiB",
    ]
