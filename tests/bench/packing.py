"""Packing of sizes like those of the SFT mixture, beside the plain algorithm, on one core.

Efficiency: packs that the tighter budget asks for at least, of those that were made. Knows: sizes,
the clock. Does not know: the algorithms (`plain_packing`, `molmo_training.data.packing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from molmo_training.data.packing import Budgets, Packer, Size
from tests.bench.plain_packing import plain_packs
from tests.bench.preprocessing import one_core
from tests.bench.processes import Row
from tests.support.sft_lengths import LONG_CONTEXT, SFT, sft_sizes

N_EXAMPLES = 4000


def rows() -> Iterator[Row]:
    """For both ways and both budgets: how full packs are, examples a pack, time an example."""
    with one_core():
        for name, budgets in (("16,384 tokens", SFT), ("36,864 tokens", LONG_CONTEXT)):
            sizes = sft_sizes(N_EXAMPLES, most_frames=budgets.n_crops)
            for way, pack in (("plain table", plain_packs), ("ours", our_packs)):
                yield from _measured(f"pack {name}: {way}", pack, sizes, budgets)


def _measured(
    what: str,
    pack: Callable[[Sequence[Size], Budgets], list[list[Size]]],
    sizes: Sequence[Size],
    budgets: Budgets,
) -> Iterator[Row]:
    began = time.perf_counter()
    packs = pack(sizes, budgets)
    took_s = time.perf_counter() - began
    n_packed = sum(map(len, packs))
    yield f"{what}: efficiency", efficiency(packs, budgets), ""
    yield f"{what}: tokens filled", fill(packs, budgets)[0], ""
    yield f"{what}: examples a pack", n_packed / len(packs), ""
    yield f"{what}: time an example", took_s / n_packed * 1e3, "ms"


def our_packs(sizes: Sequence[Size], budgets: Budgets) -> list[list[Size]]:
    """What is packed of a stream of examples; what waits at its end is left."""
    packer: Packer[None] = Packer(budgets)
    packs = []
    for size in sizes:
        if packer.is_full:
            packs.append([size for size, _ in packer.pop()])
        packer.add(size, None)
    return packs


def efficiency(packs: Sequence[Sequence[Size]], budgets: Budgets) -> float:
    """Packs that the tighter of the two budgets asks for at least, of those that were made."""
    return max(fill(packs, budgets))


def fill(packs: Sequence[Sequence[Size]], budgets: Budgets) -> tuple[float, float]:
    """Which parts of the tokens and of the crops of all packs are used."""
    n_tokens = sum(size.n_tokens for pack in packs for size in pack)
    n_crops = sum(size.n_crops for pack in packs for size in pack)
    return (
        n_tokens / (len(packs) * budgets.n_tokens),
        n_crops / (len(packs) * budgets.n_crops),
    )
