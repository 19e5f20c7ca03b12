"""Measures, and prints one table. Run: make bench, or make bench ARGS="gateway routing".

Figures of one run are to be compared with each other only: machines differ and are noisy.
Each part is a module with a function `rows`.
"""

from __future__ import annotations

import importlib
import sys

PARTS = (
    "parsing",
    "preprocessing",
    "gateway",
    "throughput",
    "routing",
    "drafting",
    "packing",
    "training",
    "memory",
)


def main(wanted: list[str]) -> int:
    if unknown := [name for name in wanted if name not in PARTS]:
        sys.stderr.write(f"bench: there is no {unknown[0]}; there are {', '.join(PARTS)}\n")
        return 2
    for name in wanted or PARTS:
        sys.stdout.write(f"\n{name}\n")
        for what, figure, unit in importlib.import_module(f"tests.bench.{name}").rows():
            sys.stdout.write(f"{what:72s} {figure:10.2f} {unit}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
