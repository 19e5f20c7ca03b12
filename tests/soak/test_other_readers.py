"""Imports of Ai2's native checkpoints in other people's programs: transformers 4.57 and stock vLLM.

Installs transformers 4.57 into a folder of its own: needs a package index.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from molmo_core.prompts import Turn
from molmo_server.engine.plugin import STOCK_SWITCH
from molmo_training.checkpoints.convert import to_hugging_face
from molmo_training.checkpoints.opened import open_checkpoint
from tests.support.conversations import Conversation, draw_image, draw_text
from tests.support.engine import Wanted, running_engine

ROOT = Path(__file__).parents[2]
NATIVE, PARITY = ROOT / "tests" / "golden" / "native", ROOT / "tests" / "golden" / "parity"
READER = ROOT / "tests" / "hf" / "stock_reader.py"
KINDS = ("olmo3", "qwen3_tied-unsharded")
CASES = ("two_images", "video_25fps_13f", "text_only")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imports")
    return {
        kind: to_hugging_face(
            open_checkpoint(NATIVE / kind), folder / kind, tokenizer=str(NATIVE / "tokenizer")
        )
        for kind in KINDS
    }


def answers(folders: dict[str, Path], home: Path, packages: Path | None) -> dict[str, Any]:
    """What stock transformers makes of the folders, without our packages."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    done = subprocess.run(
        [sys.executable, str(READER), str(PARITY), *map(str, folders.values())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_transformers_457_reads_what_5_reads(imports: dict[str, Path], tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    uv = [ROOT / ".tools" / "bin" / "uv", "pip", "install", "-q", "--python", sys.executable]
    subprocess.run([*uv, "--target", packages, "transformers==4.57.6"], check=True)
    old = answers(imports, tmp_path / "home4", packages)
    new = answers(imports, tmp_path / "home5", None)
    assert old["transformers"] == "4.57.6"
    assert new["transformers"].startswith("5.")
    for kind in KINDS:
        assert old[kind]["module"].startswith("transformers_modules.")  # the folder's own code
        for case in CASES:
            a, b = old[kind][case], new[kind][case]
            assert (a["ids"], a["greedy"]) == (b["ids"], b["greedy"])
            assert a["last_logprobs"] == pytest.approx(b["last_logprobs"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_vllm_opens_them(imports: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """With its own Molmo2 class, which computes otherwise (docs/fidelity.md): it answers."""
    prompt = Conversation(
        name="image",
        turns=(Turn(role="user", text=draw_text(6, 6)),),
        images=(draw_image(200, 120, 7),),
    )
    wanted = Wanted(checkpoint=imports[kind], environment={STOCK_SWITCH: "1"})
    with running_engine(wanted, tmp_path) as engine:
        answer = engine.chat(prompt.messages(), max_tokens=8, logprobs=True)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert 1 <= len(tokens) <= 8
    assert all(math.isfinite(token["logprob"]) for token in tokens)
