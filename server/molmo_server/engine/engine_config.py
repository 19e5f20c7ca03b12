"""Checks and completes vLLM's configuration for a Molmo2 checkpoint.

vLLM calls `MolmoEngineConfig` for our architecture in whatever way the engine is started. What
would make answers differ from the trained model is refused here, at start, not met in a request.

Knows: vLLM 0.32's configuration objects. Does not know: the command line (`launch`).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from molmo_core.errors import UnsupportedEngine

_SCHEDULING = "molmo_server.engine.scheduling"


class MolmoEngineConfig(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Choose scheduler and attention for `bidirectional: all`; `none` needs nothing."""
        if getattr(vllm_config.model_config.hf_config, "bidirectional", "all") != "all":
            return
        _check_budget(vllm_config.scheduler_config, vllm_config.model_config.max_model_len)
        if vllm_config.kv_transfer_config is not None:
            raise UnsupportedEngine(
                "a KV transfer connector is configured; keys of visual tokens are only valid for "
                "the same visual set, which connectors do not check: leave it out"
            )
        if current_platform.is_cpu():
            _choose_scheduler(vllm_config.scheduler_config, is_async=False)
        elif current_platform.is_cuda_alike():
            _choose_gpu_parts(vllm_config)
        else:
            raise UnsupportedEngine(
                f"platform {current_platform.device_name!r} has no bidirectional attention here; "
                "use CPU or CUDA, or a checkpoint trained with bidirectional: none"
            )


def _check_budget(scheduler: Any, max_model_len: int) -> None:
    """A visual region is one step, so a step must be able to hold the longest prompt."""
    if scheduler.max_num_batched_tokens < max_model_len:
        raise UnsupportedEngine(
            f"max_num_batched_tokens is {scheduler.max_num_batched_tokens}, less than "
            f"max_model_len {max_model_len}: a prompt's images are computed in one step; raise "
            "the first or lower the second"
        )
    if scheduler.long_prefill_token_threshold > 0:
        raise UnsupportedEngine(
            f"long_prefill_token_threshold is {scheduler.long_prefill_token_threshold}: it would "
            "split a prompt's images over steps; leave it 0"
        )


def _choose_scheduler(scheduler: Any, *, is_async: bool) -> None:
    name = f"{_SCHEDULING}.{'MolmoAsyncScheduler' if is_async else 'MolmoScheduler'}"
    if scheduler.scheduler_cls not in (None, name):
        raise UnsupportedEngine(
            f"scheduler_cls is {scheduler.scheduler_cls}; images need {name}: leave it out"
        )
    scheduler.scheduler_cls = name
    scheduler.async_scheduling = is_async


def _choose_gpu_parts(vllm_config: Any) -> None:
    attention, scheduler = vllm_config.attention_config, vllm_config.scheduler_config
    if attention.backend not in (None, AttentionBackendEnum.TRITON_ATTN):
        raise UnsupportedEngine(
            f"attention backend {attention.backend.name} has no bidirectional visual rows; "
            "leave it out or use TRITON_ATTN"
        )
    attention.backend = AttentionBackendEnum.TRITON_ATTN
    if vllm_config.use_v2_model_runner:
        raise UnsupportedEngine(
            "vLLM's second model runner is selected, of which the sampling repairs were not "
            "tested: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    is_simple = (
        vllm_config.parallel_config.pipeline_parallel_size == 1
        and vllm_config.speculative_config is None
    )
    wanted = scheduler.async_scheduling
    _choose_scheduler(scheduler, is_async=is_simple if wanted is None else wanted)
