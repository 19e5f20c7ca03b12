"""vLLM and torch warn while they are imported; that is not what these tests are about."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.utils
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.sample.sampler  # noqa: F401
