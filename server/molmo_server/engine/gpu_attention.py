"""vLLM's Triton attention with the visual rows corrected; registered in place of TRITON_ATTN.

**Not run on a GPU.** What was checked: the module imports, its classes are selected, and the
computation of the visual rows, which is shared with the CPU backend, is exact there.

vLLM's own mask hook takes contiguous ranges in which all tokens see each other. A video's frames
are parted by timestamps that must stay causal, and so are several images by "Image 2": no set of
ranges says "visual sees visual". So the hook gets no ranges, the kernel computes causally, and
the visual rows of a prefill are computed again without a mask (flash attention takes them).
Decoding costs what it costs in stock vLLM; a prefill computes its visual rows once more.

Full CUDA graphs hold decode steps only (plans exist in prefill steps, which run piecewise).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from molmo_core.errors import UnsupportedEngine
from molmo_server.engine.visual_attention import PlansVisualRows, RecomputesVisualRows


class MolmoTritonBuilder(PlansVisualRows, TritonAttentionMetadataBuilder):
    """Adds the plan of visual rows to Triton metadata."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            raise UnsupportedEngine(
                f"cudagraph_mode {mode.name} replays prefill steps as a whole, which would skip "
                "the visual rows; use FULL_AND_PIECEWISE, PIECEWISE or NONE"
            )


class MolmoTritonImpl(RecomputesVisualRows, TritonAttentionImpl):
    """The Triton kernel, visual rows recomputed."""

    def read_cache(
        self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # (all blocks, kv heads, block size, keys then values): not packed.
        tokens = kv_cache[blocks].transpose(1, 2).flatten(0, 1)
        keys, values = torch.split(tokens, self.head_size, dim=-1)
        return keys, values


class MolmoTritonBackend(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return MolmoTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return MolmoTritonBuilder
