"""Fuzz one target for a time: `python -m tests.fuzz points --seconds 600 [--corpus FOLDER]`.

Ends with status 0 when nothing was found; else an input that shows it lies in `--found`. With
`--corpus` what is learnt is kept for the next time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

_INSTRUMENTED = ["molmo_core", "molmo_server", "PIL"]
_LONGEST_BYTES = 16_384
_MOST_MIB = 4096


def main() -> None:
    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzz.targets import TARGETS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=None)
    parser.add_argument("--found", type=Path, default=Path("."))
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = arguments.corpus or Path(scratch)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        options = (
            f"-max_total_time={arguments.seconds}",
            f"-max_len={_LONGEST_BYTES}",
            f"-rss_limit_mb={_MOST_MIB}",
            f"-artifact_prefix={arguments.found}/{arguments.target}-",
            "-print_final_stats=1",
            "-timeout=20",
        )
        atheris.Setup([sys.argv[0], *options, str(corpus)], target.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
