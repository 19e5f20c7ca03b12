"""Read keys and values back from vLLM's CPU cache.

The cache packs a block for the instruction set in use and offers no way to read it but the
attention kernel. Packing is a permutation inside the block of one head; it is found by writing
numbered keys into a scratch block with vLLM's own operation and looking where they went.

Knows: the shape of vLLM 0.32's CPU cache. Does not know: which packing an instruction set has.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm import _custom_ops as ops

_DIGIT = 128  # numbers up to this are exact in every dtype of the cache


def read_blocks(
    kv_cache: torch.Tensor, blocks: torch.Tensor, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks, in order: two (blocks · block size, kv heads, head size).

    `kv_cache` is (all blocks, kv heads, block size, 2 · head size) as the backend holds it.
    """
    key_cache, value_cache = _halves(kv_cache)
    layout = _packing(isa, kv_cache.dtype, key_cache.shape[2], key_cache.shape[3])
    return _read(key_cache[blocks], layout[0]), _read(value_cache[blocks], layout[1])


def _halves(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values lie one after the other in each head's part of a block."""
    n_blocks, n_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(n_blocks, n_heads, 2 * block_size, -1).chunk(2, dim=2)
    return keys, values


def _read(packed: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    n_blocks, n_heads, block_size, head_size = packed.shape
    flat = packed.reshape(n_blocks, n_heads, -1)[..., source]
    ordered = flat.view(n_blocks, n_heads, block_size, head_size).transpose(1, 2)
    return ordered.reshape(n_blocks * block_size, n_heads, head_size)


@lru_cache(maxsize=8)
def _packing(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For element token · head size + dimension: its place in the packed block; keys, values."""
    number = torch.arange(block_size * head_size)
    scratch = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
    found = torch.zeros(2, block_size * head_size, dtype=torch.long)
    for digit, weight in ((number % _DIGIT, 1), (number // _DIGIT, _DIGIT)):
        written = digit.to(dtype).view(block_size, 1, head_size)
        halves = _halves(scratch)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(written, written, *halves, slots, isa)
        for half, packed in enumerate(halves):
            found[half] += packed.reshape(-1).long() * weight
    if not all(torch.equal(half.sort().values, number) for half in found):
        raise RuntimeError(
            f"the CPU cache packs blocks of {block_size} by {head_size} {dtype} for {isa!r} "
            "otherwise than by reordering; start the engine without prefix caching"
        )
    keys, values = (half.argsort() for half in found)
    return keys, values
