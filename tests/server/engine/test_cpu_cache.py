"""What was written to the CPU cache is read back, in every packing of this machine."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from molmo_server.engine.cpu_cache import read_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_heads", "head_size"), [(2, 32), (1, 64), (4, 128)])
@pytest.mark.parametrize("block_size", [32, 128])
def test_keys_and_values_come_back_in_order(dtype, n_heads, head_size, block_size):
    isa = _get_attn_isa(dtype, block_size, head_size)
    cache = torch.zeros(5, n_heads, block_size, 2 * head_size, dtype=dtype)
    halves = cache.view(5, n_heads, 2 * block_size, head_size).chunk(2, dim=2)
    blocks = torch.tensor([3, 1, 4])
    key, value = torch.randn(2, 3 * block_size, n_heads, head_size).to(dtype)
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)

    read_key, read_value = read_blocks(cache, blocks, isa)
    assert torch.equal(read_key, key)
    assert torch.equal(read_value, value)
