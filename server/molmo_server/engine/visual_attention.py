"""What turns a causal vLLM attention backend into one that honours `bidirectional: all`.

Two mixins: building a step's metadata also plans which rows are visual queries, and after the
stock kernel those rows are computed again under the bidirectional mask. Text rows, decode rows
and the KV cache stay the stock kernel's, and so does everything of other models.

Knows: vLLM 0.32's interface of metadata builders and attention implementations.
Does not know: which device, how a cache is packed; scheduling, which must bring the visual region
in one step, or the rest of it behind a prefix-cache hit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from molmo_server.engine.visual_region import VisualRows, attend_visual_rows, plan_rows

_PLAN = "molmo_visual_rows"


class PlansVisualRows:
    """For a metadata builder: attaches the step's plan to the stock metadata."""

    vllm_config: Any
    device: torch.device

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        ranges = common_attn_metadata.mm_req_doc_ranges
        if not ranges or self.vllm_config.model_config.hf_config.model_type != "molmo2":
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        # Without its own ranges the stock kernel stays causal: the visual rows are ours.
        causal = replace(common_attn_metadata, mm_req_doc_ranges=None)
        metadata = super().build(common_prefix_len, causal, fast_build)  # type: ignore[misc]
        begins = common_attn_metadata.query_start_loc_cpu.tolist()
        ends = common_attn_metadata.seq_lens_cpu_upper_bound.tolist()
        n_computed = [
            end - (begins[k + 1] - begins[k]) for k, end in enumerate(ends[: len(begins) - 1])
        ]
        setattr(metadata, _PLAN, plan_rows(ranges, begins, n_computed, self.device))
        return metadata


class RecomputesVisualRows:
    """For an attention implementation: corrects the planned rows after the stock kernel."""

    scale: float

    def read_cache(
        self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole cache blocks: two (tokens, kv heads, head size)."""
        raise NotImplementedError

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        result: torch.Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        plan: list[VisualRows] = getattr(attn_metadata, _PLAN, [])
        for rows in plan:
            cached = None
            if rows.n_cached:
                n_blocks = rows.n_cached // kv_cache.shape[2]
                blocks = attn_metadata.block_table[rows.request, :n_blocks]
                cached = self.read_cache(layer, kv_cache, blocks.long())
            attend_visual_rows(
                rows,
                query,
                key,
                value,
                output.view(query.shape),
                scale=self.scale,
                cached=cached,
            )
        return result
