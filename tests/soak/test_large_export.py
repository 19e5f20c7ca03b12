"""Export of a checkpoint of Molmo2-8B's geometry: how much memory, how fast beside `cp`.

Needs 55 GB of disk. Weights are random bytes; nothing is computed with them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molmo_hf.configuration_molmo2 import Molmo2Config
from molmo_hf.export import save_settings
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_hf.tokenizer import CONTROLS, build_tokenizer, wrap_tokenizer
from molmo_hf.weight_files import write_weights
from molmo_training.checkpoints.safetensors_weights import SafetensorsWeights

SHARD_BYTES = 5_000_000_000
N_ROUNDS = 3
_ROWS, _N_TOKENS = 151_936, 151_669
_EXPORT = (
    "import sys; from molmo_client.__main__ import main;"
    "sys.exit(main(['checkpoint', 'export', sys.argv[1], sys.argv[2]]))"
)


class RandomWeights:
    """Tensors of the given shapes out of one block of random bytes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._block = torch.randn(1 << 24).bfloat16()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        n_numbers = torch.Size(self._shapes[name]).numel()
        n_blocks = -(-n_numbers // self._block.numel())
        return self._block.repeat(n_blocks)[:n_numbers].view(self._shapes[name])

    def place(self, name: str) -> None:
        return None


def large_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as Qwen3's; what they are makes no difference to how long it is read."""
    vocab = {f"t{k}": k for k in range(_N_TOKENS - len(CONTROLS))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(CONTROLS))
    return wrap_tokenizer(tokenizer, bos_token=None)


def write_large(folder: Path) -> None:
    text = {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
        "vocab_size": _ROWS,
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
    }
    adapter = {"intermediate_size": 12288, "text_hidden_size": 4096}
    config = Molmo2Config(text_config=text, adapter_config=adapter)
    save_settings(
        folder,
        config=config,
        tokenizer=build_tokenizer(large_tokenizer(), _ROWS),
        compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        state = Molmo2ForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_weights(RandomWeights(shapes), folder, dtype=torch.bfloat16, shard_bytes=SHARD_BYTES)


def timed(source: Path, work: Callable[[], None]) -> float:
    """Seconds, with the source read from the disk and everything written to it."""
    for path in source.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    work()
    os.sync()
    return time.monotonic() - began


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_export_of_8b(tmp_path: Path, show: Callable[..., None]) -> None:
    source, copy, out = tmp_path / "source", tmp_path / "copy", tmp_path / "out"
    write_large(source)
    os.sync()
    ratios, peak_kb = [], 0
    for number in range(N_ROUNDS):
        cp_s = timed(source, lambda: subprocess.run(["cp", "-r", source, copy], check=True))
        shutil.rmtree(copy)
        usage = tmp_path / "usage.json"
        code = (
            "import json, resource, subprocess, sys;"
            f"subprocess.run([sys.executable, '-c', {_EXPORT!r}, *sys.argv[1:3]], check=True);"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
            "open(sys.argv[3], 'w').write(json.dumps(used))"
        )
        command = [sys.executable, "-c", code, source, out, usage]
        export_s = timed(source, lambda c=command: subprocess.run(c, check=True))
        ratios.append(cp_s / export_s)
        peak_kb = max(peak_kb, json.loads(usage.read_text()))
        last = f"cp {cp_s:.1f} s, export {export_s:.1f} s"
        if number < N_ROUNDS - 1:
            shutil.rmtree(out)
    largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
    show(
        f"8B geometry: {last}; speed {[round(r, 2) for r in ratios]} of cp; peak "
        f"{peak_kb / 1e6:.2f} GB, largest file {largest / 1e9:.2f} GB"
    )
    a, b = SafetensorsWeights(source), SafetensorsWeights(out)
    assert a.shapes() == b.shapes()
    for name in (
        "model.transformer.wte.new_embedding",
        "model.transformer.blocks.35.mlp.ff_out.weight",
    ):
        assert torch.equal(a.read(name), b.read(name))
    assert peak_kb * 1024 <= 2 * largest
    assert statistics.median(ratios) >= 0.7
