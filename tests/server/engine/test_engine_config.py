"""What would make the engine unfaithful is refused at start, in a sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from molmo_core.errors import UnsupportedEngine
from molmo_server.engine import engine_config
from molmo_server.engine.engine_config import MolmoEngineConfig


def configuration(**changes):
    """A vLLM configuration that is in order, with `part__field` changes."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(bidirectional="all"), max_model_len=4096
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=4096,
            long_prefill_token_threshold=0,
            scheduler_cls=None,
            async_scheduling=None,
        ),
        attention_config=SimpleNamespace(backend=None),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, field, value)
    return config


def on(monkeypatch, platform):
    fake = SimpleNamespace(
        is_cpu=lambda: platform == "cpu",
        is_cuda_alike=lambda: platform == "cuda",
        device_name=platform,
    )
    monkeypatch.setattr(engine_config, "current_platform", fake)


def test_cpu_gets_the_synchronous_scheduler(monkeypatch):
    on(monkeypatch, "cpu")
    config = configuration()
    MolmoEngineConfig.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls.endswith(".MolmoScheduler")
    assert config.scheduler_config.async_scheduling is False
    MolmoEngineConfig.verify_and_update_config(config)  # vLLM may ask twice


@pytest.mark.parametrize(
    ("changes", "scheduler"),
    [
        ({}, "MolmoAsyncScheduler"),
        ({"scheduler_config__async_scheduling": False}, "MolmoScheduler"),
        ({"parallel_config__pipeline_parallel_size": 2}, "MolmoScheduler"),
        ({"speculative_config": "ngram"}, "MolmoScheduler"),
    ],
)
def test_gpu_gets_triton_attention_and_a_fitting_scheduler(monkeypatch, changes, scheduler):
    on(monkeypatch, "cuda")
    config = configuration(**changes)
    MolmoEngineConfig.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls.endswith(f".{scheduler}")
    assert config.attention_config.backend is AttentionBackendEnum.TRITON_ATTN


@pytest.mark.parametrize(
    ("platform", "changes", "words"),
    [
        ("cpu", {"scheduler_config__max_num_batched_tokens": 4095}, "less than max_model_len 4096"),
        ("cpu", {"scheduler_config__long_prefill_token_threshold": 512}, "leave it 0"),
        ("cpu", {"scheduler_config__scheduler_cls": "their.Scheduler"}, "leave it out"),
        ("cpu", {"kv_transfer_config": object()}, "KV transfer connector"),
        ("tpu", {}, "platform 'tpu'"),
        ("cuda", {"attention_config__backend": AttentionBackendEnum.FLASHINFER}, "FLASHINFER"),
        ("cuda", {"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_would_be_unfaithful_is_refused(monkeypatch, platform, changes, words):
    on(monkeypatch, platform)
    with pytest.raises(UnsupportedEngine, match=words):
        MolmoEngineConfig.verify_and_update_config(configuration(**changes))


def test_a_causal_checkpoint_keeps_vllms_own_parts(monkeypatch):
    on(monkeypatch, "cpu")
    config = configuration(
        model_config__hf_config__bidirectional="none",
        scheduler_config__max_num_batched_tokens=512,
    )
    MolmoEngineConfig.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls is None
