"""`vllm bench serve`, unchanged, against the gateway: chat about pictures, and completions.

Prints what it measured; what the gateway costs beside a direct connection is for `make bench`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint import TINY
from tests.support.conversations import draw_text

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

N_PROMPTS = 64
N_TOKENS = 32
_START = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""The `vllm` command is broken in the distribution for CPUs; this is what it runs."""
_PICTURES = {
    "dataset-name": "random-mm",
    "random-mm-base-items-per-request": 1,
    "random-mm-limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
    "random-mm-bucket-config": "{(256, 256, 1): 1.0}",
    **{"random-input-len": 64, "random-output-len": N_TOKENS},
}
"""A drawn picture and a text in each."""
_TEXTS = {"dataset-name": "custom", "dataset-path": "texts.jsonl", "custom-output-len": N_TOKENS}
"""Unlike `random`, which draws tokens that a text must not spell out."""
_SWITCHES = ("--ignore-eos", "--save-result", "--skip-chat-template")
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai-chat": ("/v1/chat/completions", _PICTURES),
    "openai": ("/v1/completions", _TEXTS),
}
"""Path, and what is asked."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    errors = (tmp_path_factory.mktemp("serve") / "errors.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "molmo_client", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    assert process.stdout is not None
    told = ""
    while "molmo point" not in told:
        line = process.stdout.readline()
        assert line, Path(errors.name).read_text()[-3000:]
        told += line
    found = re.search(r"http://127\.0\.0\.1:\d+", told)
    assert found is not None
    yield found.group()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    process.stdout.close()
    errors.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_vllm_bench_serve(
    url: str, backend: str, tmp_path: Path, show: Callable[..., None]
) -> None:
    figures = run_bench(url, backend, tmp_path)

    show(
        f"{backend}: {figures['completed']} of {N_PROMPTS} requests of {N_TOKENS} tokens, "
        f"{figures['request_throughput']:.1f} a second, "
        f"{figures['output_throughput']:.0f} tokens a second, first token after "
        f"{figures['median_ttft_ms']:.0f} ms, then {figures['median_tpot_ms']:.1f} ms a token"
    )
    assert (figures["completed"], figures["failed"]) == (N_PROMPTS, 0)
    assert figures["total_output_tokens"] == N_PROMPTS * N_TOKENS


def run_bench(url: str, backend: str, folder: Path) -> dict[str, Any]:
    path, dataset = BACKENDS[backend]
    texts = [{"prompt": draw_text(k, 40)} for k in range(N_PROMPTS)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    options = {
        **{"backend": backend, "base-url": url, "endpoint": path, "model": "molmo2"},
        "tokenizer": TINY,
        **dataset,
        **{"num-prompts": N_PROMPTS, "max-concurrency": 8, "seed": 0},
        **{"result-dir": folder, "result-filename": "figures.json"},
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run(
        [sys.executable, "-c", _START, *flags, *_SWITCHES],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures
