"""Engines that all tests of this folder share: starting one costs more than all its answers.

The context is short, so that prompts compete for the tokens of a step.
"""

from __future__ import annotations

import warnings

import pytest

# vLLM and torch warn while they are imported; that is not what these tests are about.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.utils
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.sample.sampler  # noqa: F401

from molmo_server.engine.plugin import STOCK_SWITCH
from tests.support.checkpoint import write_checkpoint
from tests.support.engine import Wanted, engines_side_by_side
from tests.support.reference import Reference

MAX_LEN = 2560


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    variants = ("qwen3", "olmo3", "causal")
    return {variant: write_checkpoint(folder / variant, variant) for variant in variants}


@pytest.fixture(scope="session")
def references(checkpoints):
    return {variant: Reference(folder) for variant, folder in checkpoints.items()}


@pytest.fixture(scope="session")
def engines(checkpoints, tmp_path_factory):
    """ "qwen3" and "olmo3" as trained; "stock": the first one in vLLM's own Molmo2; "causal"
    with steps of 160 tokens, which cut every image into several."""
    short = {"max_model_len": MAX_LEN}
    cut = {**short, "extra_arguments": ("--max-num-batched-tokens", "160")}
    wanted = {
        "qwen3": Wanted(checkpoint=checkpoints["qwen3"], fields=short),
        "olmo3": Wanted(checkpoint=checkpoints["olmo3"], fields=short),
        "stock": Wanted(
            checkpoint=checkpoints["qwen3"], fields=short, environment={STOCK_SWITCH: "1"}
        ),
        "causal": Wanted(checkpoint=checkpoints["causal"], fields=cut),
    }
    with engines_side_by_side(wanted, tmp_path_factory.mktemp("engines")) as engines:
        yield engines
