"""vLLM's scheduler with the visual region of a prompt kept whole.

Under `bidirectional: all` the keys and values of a visual token depend on every image and frame
of its prompt. So (1) tokens up to the end of the region are computed in one step, also when
requests compete for token, encoder and cache budgets; the text behind may be chunked. (2) The
block hashes of a request with media are salted with all its media, their places and the text
between them: a block is only shared between prompts with the same region. Then (3) a
prefix-cache hit may end inside the region: what it holds was computed with the whole region, and
the attention computes the rest against it. (A cache that is quantised cannot be read back for
that: such a hit is dropped.) With `none` the stock scheduler runs and all this is free.

Knows: vLLM 0.32's Scheduler. Does not know: tokens, attention.
"""

from __future__ import annotations

from typing import Any

from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from molmo_server.engine.visual_region import region_digest, region_end


class KeepsVisualRegionWhole:
    """The rules above, over either of vLLM's schedulers."""

    cache_config: Any
    encoder_cache_manager: Any
    kv_cache_manager: Any

    def add_request(self, request: Request) -> None:
        if request.mm_features:
            region = region_digest(request.mm_features, request.prompt_token_ids)
            request.cache_salt = f"{request.cache_salt or ''}|visual-region:{region}"
            request.block_hashes = []
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        hit = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        is_inside = 0 < hit[1] < region_end(request.mm_features)
        if is_inside and is_quantized_kv_cache(self.cache_config.cache_dtype):
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return hit  # type: ignore[no-any-return]

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        nothing: tuple[list[int], int, int, list[int], list[int]] = (
            [], 0, encoder_compute_budget, [], [],
        )  # fmt: skip
        end = region_end(request.mm_features)
        if num_computed_tokens < end and num_computed_tokens + num_new_tokens < end:
            return nothing
        scheduled = super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        if num_computed_tokens < end and num_computed_tokens + scheduled[1] < end:
            # An image did not fit: give back the cached ones that were just reserved.
            self.encoder_cache_manager.free(request)
            return nothing
        return scheduled  # type: ignore[no-any-return]


class MolmoScheduler(KeepsVisualRegionWhole, Scheduler):
    """For synchronous scheduling (CPU)."""


class MolmoAsyncScheduler(KeepsVisualRegionWhole, AsyncScheduler):
    """For asynchronous scheduling (GPU)."""
