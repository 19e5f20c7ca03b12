"""vLLM's CPU attention with the visual rows corrected; registered in place of CPU_ATTN.

The stock backend computes image tokens causally and says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from molmo_server.engine.cpu_cache import read_blocks
from molmo_server.engine.visual_attention import PlansVisualRows, RecomputesVisualRows


class MolmoCPUBuilder(PlansVisualRows, CPUAttentionMetadataBuilder):
    """Adds the plan of visual rows to CPU metadata."""


class MolmoCPUImpl(RecomputesVisualRows, CPUAttentionBackendImpl):
    """The CPU kernel, visual rows recomputed."""

    def read_cache(
        self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return read_blocks(kv_cache, blocks, layer.isa)


class MolmoCPUBackend(CPUAttentionBackend):
    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return MolmoCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return MolmoCPUBuilder
